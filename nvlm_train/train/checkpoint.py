"""Saving and loading in megatron-core's distributed format, at any layout.

A checkpoint is written into a directory with a temporary name and renamed when every rank's shards
are on disk: a directory `STAGE-STEP` is complete, whatever happened to the process that wrote it.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.transformer.module import MegatronModule

from nvlm_train.config.schema import CheckpointConfig
from nvlm_train.errors import CheckpointError
from nvlm_train.model.canonical import sharding_metadata
from nvlm_train.parallel.topology import Topology
from nvlm_train.train.engine import Engine
from nvlm_train.train.mcore_fixes import keep_bucket_padding, report_writes_through_files
from nvlm_train.train.state import FILE_NAME, RunState, write_state

logger = logging.getLogger(__name__)

_WRITING = "writing-"


def checkpoint_dir(run_dir: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_dir / "checkpoints"


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    directory = checkpoint_dir(run_dir)
    found = [path.parent for path in directory.glob(f"*/{FILE_NAME}")]
    return sorted(
        (path for path in found if not path.name.startswith(_WRITING)),
        key=lambda path: (path / FILE_NAME).stat().st_mtime_ns,
    )


class Saver:
    """Saves an engine now and then. Every method is called by all ranks together."""

    def __init__(self, run_dir: Path, config: CheckpointConfig) -> None:
        self._directory = checkpoint_dir(run_dir)
        self._config = config
        report_writes_through_files()
        self._queue = AsyncCallsQueue()
        if dist.get_rank() == 0:
            self._directory.mkdir(parents=True, exist_ok=True)
            for left_over in self._directory.glob(f"{_WRITING}*"):
                logger.warning("removing %s: a save that was never completed", left_over)
                shutil.rmtree(left_over)
        dist.barrier()

    def is_due(self, step: int, num_steps: int) -> bool:
        """Whether to save after `step` steps of a stage of `num_steps`."""
        return step == num_steps or step % self._config.interval_steps == 0

    def save(self, engine: Engine, state: RunState) -> None:
        """Starts a save; an earlier one that still runs is waited for first.

        Writer processes are forked (or fed from host copies on CUDA), so that training may change
        the weights at once.
        """
        self.wait()
        name = f"{state.stage}-{state.step:08d}"
        target, writing = self._directory / name, self._directory / f"{_WRITING}{name}"
        if dist.get_rank() == 0:
            writing.mkdir(exist_ok=True)
        dist.barrier()
        request = dist_checkpointing.save(
            sharded_state(engine, is_loading=False),
            str(writing),
            async_sharded_save=True,
            preprocess_common_before_consistancy_check=_without_optimizer,
        )
        assert request is not None
        request.add_finalize_fn(lambda: self._publish(writing, target, state))
        self._queue.schedule_async_request(request)
        if not self._config.asynchronous:
            self.wait()

    def poll(self) -> None:
        """Publishes a save whose writers are done; cheap when none is under way."""
        if self._queue.get_num_unfinalized_calls():
            self._queue.maybe_finalize_async_calls(blocking=False)

    def wait(self) -> None:
        """Waits until every started save is published."""
        self._queue.maybe_finalize_async_calls(blocking=True)

    def close(self) -> None:
        """Waits and ends the writers."""
        self.wait()
        self._queue.close()

    def _publish(self, writing: Path, target: Path, state: RunState) -> None:
        if dist.get_rank() == 0:
            write_state(state, writing)
            if target.exists():
                shutil.rmtree(target)
            os.replace(writing, target)
            _sync_directory(self._directory)
            logger.info("saved %s", target)
            for old in complete_checkpoints(self._directory.parent)[: -self._config.keep_last]:
                shutil.rmtree(old)
        dist.barrier()


def load(engine: Engine, directory: Path, same_layout: bool) -> None:
    """Restores weights, optimizer and, where the layout is the one that saved, the RNG.

    Raises:
        CheckpointError: the checkpoint does not fit the engine's model.
    """
    state = sharded_state(engine, is_loading=True)
    if not same_layout:
        state.pop("rng")
    loaded = _load(state, directory)
    engine.model.module.load_state_dict(loaded["model"], strict=True)
    if "optimizer" in loaded:
        engine.optimizer.load_state_dict(loaded["optimizer"])
    if same_layout:
        _restore_rng(loaded["rng"])


def load_weights(module: MegatronModule, directory: Path) -> None:
    """Weights only: hand-over between stages, whose optimizer starts afresh, and generation.

    Raises:
        CheckpointError: the checkpoint does not fit the model.
    """
    loaded = _load({"model": module.sharded_state_dict(metadata=sharding_metadata())}, directory)
    module.load_state_dict(loaded["model"], strict=True)


def sharded_state(engine: Engine, is_loading: bool) -> dict[str, Any]:
    """What is saved: weights, optimizer, RNG, each with its place in the whole."""
    state = {"model": _model_state(engine), "rng": _rng_state(engine.topology)}
    # A pipeline stage without a trainable parameter has no optimizer state, and no way to ask for it.
    if not engine.optimizer.is_stub_optimizer:
        keep_bucket_padding(engine.optimizer)
        metadata = {"distrib_optim_sharding_type": "fully_reshardable", **sharding_metadata()}
        state["optimizer"] = engine.optimizer.sharded_state_dict(
            _model_state(engine), is_loading=is_loading, metadata=metadata
        )
    return state


def _model_state(engine: Engine) -> dict[str, Any]:
    state: dict[str, Any] = engine.model.module.sharded_state_dict(metadata=sharding_metadata())
    return state


def _load(state: dict[str, Any], directory: Path) -> dict[str, Any]:
    from megatron.core.dist_checkpointing.core import CheckpointingException

    try:
        loaded: dict[str, Any] = dist_checkpointing.load(state, str(directory))
    except CheckpointingException as error:
        raise CheckpointError(f"{directory} does not fit the recipe's model: {error}") from error
    return loaded


def _rng_state(topology: Topology) -> ShardedObject:
    data = {
        "torch": torch.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    if torch.cuda.is_available():
        data["cuda"] = torch.cuda.get_rng_state()
    grid = (topology.pipeline_size, topology.tensor_size, topology.data_size)
    place = (topology.pipeline_rank, topology.tensor_rank, topology.data_rank)
    return ShardedObject("rng", data, grid, place)


def _restore_rng(data: dict[str, Any]) -> None:
    torch.set_rng_state(data["torch"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(data["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(data["tracker"])


def _without_optimizer(common: dict[str, Any]) -> dict[str, Any]:
    """What megatron-core compares between ranks: a stage that trains nothing has no optimizer."""
    return {key: value for key, value in common.items() if key != "optimizer"}


def _sync_directory(directory: Path) -> None:
    """Makes the rename survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
