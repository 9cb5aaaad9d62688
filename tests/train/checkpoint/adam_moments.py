"""Runs on the workers: optimizer states of the small model, saved and loaded in other layouts."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from torch import Tensor

from nvlm_train.config.schema import ParallelConfig
from nvlm_train.train import engine as engine_module
from nvlm_train.train.checkpoint import sharded_state, shares
from nvlm_train.train.checkpoint.shares import distributed_optimizers
from nvlm_train.train.engine import Engine
from nvlm_train.train.placing import place
from nvlm_train.train.step import run_step
from tests.parity import recipes
from tests.parity.gradients import start_engine
from tests.train.checkpoint.direct_save import save_directly

BUCKET = 2000
"""Elements of a gradient bucket: the small model then has many, each padded."""
Moments = dict[str, dict[str, Tensor]]


def train_and_save(parallel: ParallelConfig, directory: Path, is_broken: bool) -> list[int]:
    """Trains three steps with several buckets and saves. Returns the padding between buckets."""
    with small_buckets():
        engine = trained(parallel)
    with _reversed(is_broken):
        save_directly(engine, directory)
    buckets = [bucket for buffer in engine.model.buffers for bucket in buffer.buckets[:-1]]
    return [bucket.grad_data.numel() - bucket.numel_unpadded for bucket in buckets]


def load(directory: Path) -> Moments:
    """Returns moments after a load into a single process."""
    engine = start_engine(ParallelConfig())
    sharded_state.load(engine, directory, same_layout=False)
    return _moments(engine)


def trained_moments() -> Moments:
    """Returns moments of the same training in a single process, never saved."""
    return _moments(trained(ParallelConfig()))


def trained(parallel: ParallelConfig, **changes: object) -> Engine:
    # The bias of keys has next to no gradient (softmax does not see it), and Adam makes whole steps of
    # its rounding errors: with a small rate they stay rounding errors of the bias.
    engine = start_engine(parallel, lr=1e-4, **changes)
    for step in range(3):
        batch = recipes.step_batch(recipes.MIXED, engine.topology.share, step)
        run_step(engine, place(batch, engine.topology), num_sources=2)
    return engine


def _moments(engine: Engine) -> Moments:
    """Returns moments by the module's own parameter names; in a single process every parameter is whole."""
    (optimizer,) = distributed_optimizers(engine.optimizer)
    found: Moments = {}
    for name, parameter in engine.model.module.named_parameters():
        state = optimizer._get_main_param_and_optimizer_states(parameter)
        found[name] = {
            kind: state[kind].detach().clone() for kind in ("exp_avg", "exp_avg_sq", "param")
        }
    return found


@contextlib.contextmanager
def small_buckets() -> Iterator[None]:
    original = engine_module.ddp_config

    def small(stage, topology):
        return dataclasses.replace(
            original(stage, topology), overlap_grad_reduce=True, bucket_size=BUCKET
        )

    with mock.patch.object(engine_module, "ddp_config", small):
        yield


@contextlib.contextmanager
def _reversed(is_broken: bool) -> Iterator[None]:
    """Deliberate bug: a rank writes the numbers of a range from the last to the first."""
    original = shares._states

    def broken(*arguments):
        return {kind: state.flip(0) for kind, state in original(*arguments).items()}

    with mock.patch.object(shares, "_states", broken if is_broken else original):
        yield
