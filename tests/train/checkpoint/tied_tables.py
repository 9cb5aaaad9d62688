"""Runs on the workers: tied, padded tables and their moments, saved and loaded in other layouts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from nvlm_train.config.schema import ParallelConfig
from nvlm_train.train.checkpoint import sharded_state
from nvlm_train.train.checkpoint.shares import distributed_optimizers
from nvlm_train.train.engine import Engine
from tests.parity import recipes
from tests.parity.gradients import start_engine
from tests.train.checkpoint import adam_moments
from tests.train.checkpoint.direct_save import save_directly

TOKENS = 251
LANGUAGE = replace(recipes.LANGUAGE, tied_embeddings=True, num_tokens=TOKENS)
MODEL = replace(recipes.MODEL, language=LANGUAGE)


@dataclass(frozen=True)
class Copy:
    """A whole table and its moments, as one end of the pipeline has them."""

    states: dict[str, Tensor]
    """`param` in fp32, `exp_avg`, `exp_avg_sq`, each [V, H]."""


def train_and_save(parallel: ParallelConfig, directory: Path) -> list[int]:
    """Trains three steps with several buckets and saves. Returns the padding between buckets."""
    with adam_moments.small_buckets():
        engine = adam_moments.trained(parallel, model=MODEL)
    save_directly(engine, directory)
    buckets = [bucket for buffer in engine.model.buffers for bucket in buffer.buckets]
    return [bucket.grad_data.numel() - bucket.numel_unpadded for bucket in buckets]


def load(parallel: ParallelConfig, directory: Path) -> list[Copy]:
    """The copies after a load into a layout without data parallelism, the first stage's first."""
    engine = start_engine(parallel, model=MODEL)
    sharded_state.load(engine, directory, same_layout=False)
    return _copies(engine)


def trained_copies(parallel: ParallelConfig) -> list[Copy]:
    """The copies after the same training, never saved."""
    return _copies(adam_moments.trained(parallel, model=MODEL))


def start() -> Tensor:
    """The table before training, in a single process."""
    return start_engine(ParallelConfig(), model=MODEL).model.module.language_model.table().detach()


def _copies(engine: Engine) -> list[Copy]:
    topology = engine.topology
    own = None
    if topology.is_first_pp_stage or topology.is_last_pp_stage:
        table = engine.model.module.language_model.table()
        own = (int(not topology.is_first_pp_stage), topology.tensor_rank, _states(engine, table))
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    parts = sorted((each for each in everyone if each is not None), key=lambda each: each[:2])
    stages = sorted({stage for stage, _, _ in parts})
    return [_joined([states for at, _, states in parts if at == stage]) for stage in stages]


def _states(engine: Engine, table: torch.nn.Parameter) -> dict[str, Tensor]:
    for optimizer in distributed_optimizers(engine.optimizer):
        if table in optimizer.model_param_gbuf_map:
            found = optimizer._get_main_param_and_optimizer_states(table)
            names = ("param", "exp_avg", "exp_avg_sq")
            return {name: found[name].detach().clone().view(table.shape) for name in names}
    raise AssertionError("no optimizer has the table")


def _joined(slices: list[dict[str, Tensor]]) -> Copy:
    return Copy({name: torch.cat([each[name] for each in slices]) for name in slices[0]})
