"""This process's place in a stage's layout, built on megatron-core's process groups."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from nvlm_train.batch import RankShare
from nvlm_train.config.schema import ParallelConfig
from nvlm_train.errors import ConfigError
from nvlm_train.parallel import cpu, kernels, mcore_fixes


class Layout(NamedTuple):
    """Holds the sizes of tensor, pipeline and data parallelism. Checkpoints store them as a list."""

    tensor: int
    pipeline: int
    data: int


class FeatureGroups(NamedTuple):
    """Holds groups in which features of tiles are exchanged beside the training.

    Collectives of one group wait for each other, so these are not the groups that layers use.
    """

    replica: ProcessGroup
    """All ranks of this replica."""
    first_stage: ProcessGroup
    """Those of its first pipeline stage; on the ranks of other stages their tensor-parallel group."""


@dataclass(frozen=True)
class Topology:
    """Holds this process's ranks and the sizes of one stage's layout.

    Ranks are laid out tensor fastest, then data, then pipeline (megatron-core's default order). A
    model replica is the TP x PP ranks with one data-parallel rank; its rank 0 to TP - 1 are the first
    pipeline stage.
    """

    world_size: int
    rank: int
    tensor_size: int
    tensor_rank: int
    pipeline_size: int
    pipeline_rank: int
    data_size: int
    data_rank: int
    replica_group: ProcessGroup
    features: FeatureGroups
    data_group: ProcessGroup

    @property
    def layout(self) -> Layout:
        return Layout(self.tensor_size, self.pipeline_size, self.data_size)

    @property
    def is_first_pp_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def is_last_pp_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def replica_size(self) -> int:
        return self.tensor_size * self.pipeline_size

    @property
    def replica_rank(self) -> int:
        return self.pipeline_rank * self.tensor_size + self.tensor_rank

    @property
    def share(self) -> RankShare:
        """Returns this rank's part of every step."""
        return RankShare(self.data_rank, self.data_size, self.replica_rank, self.replica_size)


@contextmanager
def process_group() -> Iterator[None]:
    """Joins the world that torchrun or SLURM describes in the environment, or a world of one rank.

    The process groups are destroyed when the block ends without an error. After an error they are
    not: NCCL would wait for ranks that may be gone, and the process ends anyway
    (train/health/ending.py).
    """
    is_ours = start_process_group()
    yield
    if is_ours:
        from megatron.core import parallel_state as mpu

        mpu.destroy_model_parallel()
        dist.destroy_process_group()  # all groups, those of the layout too


def start_process_group() -> bool:
    """Joins the world for as long as the process lives. Returns False when it had joined one before."""
    cpu.install()
    kernels.install()
    mcore_fixes.install()
    if dist.is_initialized():
        return False
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    place = place_in_world(os.environ, torch.cuda.is_available())
    if place.device is not None:
        torch.cuda.set_device(place.device)
    dist.init_process_group(
        backend=place.backend,
        rank=place.rank,
        world_size=place.world_size,
        timeout=timedelta(minutes=30),
        device_id=place.device,
    )
    return True


@dataclass(frozen=True)
class PlaceInWorld:
    """Holds what a process needs to join the world."""

    backend: Literal["nccl", "gloo"]
    rank: int
    world_size: int
    device: torch.device | None
    """The rank's GPU; None on CPUs. With it NCCL connects at once, instead of guessing the device at
    the first collective, where a wrong guess hangs the world."""


def place_in_world(environment: Mapping[str, str], has_cuda: bool) -> PlaceInWorld:
    """Reads the variables that torchrun and the launch script set: RANK, WORLD_SIZE and LOCAL_RANK."""
    rank, world = int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))
    if not has_cuda:
        return PlaceInWorld("gloo", rank, world, None)
    return PlaceInWorld(
        "nccl", rank, world, torch.device("cuda", int(environment.get("LOCAL_RANK", "0")))
    )


def device() -> torch.device:
    """Returns the device that this process computes on."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return cpu.CPU


def _leave_groups() -> None:
    """Destroys megatron-core's process groups, which it only forgets by itself.

    Each group has threads and sockets, and with NCCL also GPU buffers. The engine of the earlier stage
    holds them too, with its weights and optimizer. All of it is freed here, before the next stage
    takes memory.
    """
    from megatron.core import parallel_state as mpu

    left = [group for group in mpu._global_process_group_list or () if group is not None]
    mpu.destroy_model_parallel()
    collect_engines()
    for group in left:
        dist.destroy_process_group(group)


def collect_engines() -> None:
    """Frees engines that nobody holds any more. Cycles through tensors and hooks keep them alive.

    The first pass of the garbage collector revives tensors that C++ still refers to, and what they
    hold; the second pass frees them.
    """
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    # megatron-core remembers the angles of 32 embeddings, and with each of them its process group.
    RotaryEmbedding.forward.cache_clear()
    for _ in range(2):
        gc.collect()


def build_topology(parallel: ParallelConfig, seed: int) -> Topology:
    """Makes the process groups of a layout, in place of those of an earlier stage.

    Args:
        parallel: the stage's layout.
        seed: seeds dropout (see `_seed_dropout`).

    Raises:
        ConfigError: the world size is not a multiple of tensor x pipeline.
    """
    from megatron.core import parallel_state as mpu

    world, replica = dist.get_world_size(), parallel.tensor * parallel.pipeline
    if world % replica:
        raise ConfigError(
            [
                f"world size {world} is not a multiple of parallel.tensor={parallel.tensor} x "
                f"parallel.pipeline={parallel.pipeline}; start a multiple of {replica} processes"
            ]
        )
    if mpu.model_parallel_is_initialized():
        _leave_groups()
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        create_gloo_process_groups=False,
    )
    _seed_dropout(seed)
    return Topology(
        world_size=world,
        rank=dist.get_rank(),
        tensor_size=parallel.tensor,
        tensor_rank=mpu.get_tensor_model_parallel_rank(),
        pipeline_size=parallel.pipeline,
        pipeline_rank=mpu.get_pipeline_model_parallel_rank(),
        data_size=mpu.get_data_parallel_world_size(),
        data_rank=mpu.get_data_parallel_rank(),
        replica_group=mpu.get_model_parallel_group(),
        features=_make_feature_groups(parallel),
        data_group=mpu.get_data_parallel_group(),
    )


def _make_feature_groups(parallel: ParallelConfig) -> FeatureGroups:
    """Makes those of every replica, and returns this rank's."""
    from megatron.core import parallel_state as mpu

    replica_group, first_stage = (
        mpu.get_model_parallel_group(),
        mpu.get_tensor_model_parallel_group(),
    )
    tensor, pipeline = parallel.tensor, parallel.pipeline
    data = dist.get_world_size() // (tensor * pipeline)
    for replica in range(data if tensor * pipeline > 1 else 0):
        stages = [
            range(first, first + tensor)
            for first in ((stage * data + replica) * tensor for stage in range(pipeline))
        ]
        # megatron-core's function remembers the groups, and they are left with its own.
        whole = mpu.create_group([rank for stage in stages for rank in stage])
        first = mpu.create_group(list(stages[0]))
        if replica == mpu.get_data_parallel_rank():
            replica_group = whole
            first_stage = first if mpu.is_pipeline_first_stage() else first_stage
    return FeatureGroups(replica_group, first_stage)


def _seed_dropout(seed: int) -> None:
    """Seeds the generators that dropout draws from.

    The default generator is the same on the tensor-parallel ranks of a pipeline stage, and differs
    between pipeline stages and replicas. The tracker's generator differs on every rank, as
    megatron-core's `model_parallel_cuda_manual_seed` documents.

    Megatron-LM seeds data-parallel ranks differently only on request (`--data-parallel-random-init`),
    because its initial weights come from the same generator. Ours do not (model/global_weights.py),
    and replicas that drop the same places would average less noise away.
    """
    from megatron.core import parallel_state as mpu
    from megatron.core import tensor_parallel

    stages = mpu.get_pipeline_model_parallel_world_size()
    place = mpu.get_data_parallel_rank() * stages + mpu.get_pipeline_model_parallel_rank()
    # The tracker adds 2718 + the tensor-parallel rank to this seed: below TP 82 all seeds differ.
    tensor_parallel.model_parallel_cuda_manual_seed(seed + 100 * place, force_reset_rng=True)
