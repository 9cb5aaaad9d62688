"""Runs on the workers: real updates with the gradients they used, and the weights before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from nvlm_train.batch import StepBatch
from nvlm_train.config.schema import ParallelConfig
from nvlm_train.train.checkpoint import sharded_state
from nvlm_train.train.engine import Engine
from nvlm_train.train.optimizer import gradient_norm, update
from tests.parity import cross_gradients, cross_recipes, gradients, recipes
from tests.train.checkpoint.direct_save import save_directly

RATES = (1e-2, 5e-3, 5e-3, 2e-3)
"""Of the steps: large, so that decay shows, and changing, so that each is seen to be used."""


@dataclass(frozen=True)
class Training:
    """Holds whole tensors by canonical name, on rank 0 only."""

    before: dict[str, Tensor]
    gradients: list[dict[str, Tensor]]
    """Of each step, before they are clipped."""
    after: dict[str, Tensor]


def train(name: str, parallel: ParallelConfig) -> Training:
    """Makes one update for each of RATES."""
    return _updates(_engine(name, parallel), name, range(len(RATES)))


def train_and_resume(
    name: str, parallel: ParallelConfig, directory: Path, stored_decay: float
) -> Training:
    """Trains the same in two halves, with a checkpoint between them whose groups say `stored_decay`.

    Until now every group had the recipe's weight decay, that of norms included: such a checkpoint is
    written here.
    """
    first = _engine(name, parallel)
    half = _updates(first, name, range(2))
    for group in first.optimizer.param_groups:
        group["weight_decay"] = stored_decay
        group["betas"], group["eps"] = (0.5, 0.5), 1.0
    save_directly(first, directory)
    second = _engine(name, parallel)
    sharded_state.load(second, directory, same_layout=True)
    rest = _updates(second, name, range(2, len(RATES)))
    return Training(half.before, half.gradients + rest.gradients, rest.after)


def train_and_hand_over(name: str, parallel: ParallelConfig, directory: Path) -> Training:
    """Makes two updates of a stage that starts from another's weights, with moments of zero."""
    first = _engine(name, parallel)
    _updates(first, name, range(2))
    save_directly(first, directory)
    second = _engine(name, parallel)
    sharded_state.load_weights(second.model.module, directory)
    second.reload_optimizer_weights()
    return _updates(second, name, range(2))


def _engine(name: str, parallel: ParallelConfig) -> Engine:
    if name == "d":
        return gradients.start_engine(parallel)
    return cross_gradients.start_engine(name, parallel)


def _batch(engine: Engine, name: str, step: int) -> StepBatch:
    share = engine.topology.share
    if name == "d":
        return recipes.step_batch(recipes.MIXED, share, step)
    return cross_recipes.step_batch(name, cross_recipes.MIXED, share, step, 1)


def _updates(engine: Engine, name: str, steps: Sequence[int]) -> Training:
    before, used = _weights(engine), []
    for step in steps:
        engine.set_learning_rate(RATES[step])
        # Gathers whole gradients; what the optimizer reads, a rank's own part of them, stays as it is.
        _, whole = gradients.of_batch(engine, _batch(engine, name, step))
        used.append(whole if dist.get_rank() == 0 else {})
        update(engine.optimizer, gradient_norm(engine.optimizer))
    return Training(before, used, _weights(engine))


def _weights(engine: Engine) -> dict[str, Tensor]:
    engine.whole_model()
    whole = gradients.gather(engine, lambda parameter: parameter.data)
    return whole if dist.get_rank() == 0 else {}
