"""Runs on the workers: steps of X and H in a layout."""

from __future__ import annotations

import torch.distributed as dist

from nvlm_train.config.schema import ParallelConfig
from nvlm_train.train.engine import Engine
from nvlm_train.train.placing import place
from nvlm_train.train.step import run_step
from tests.parity import cross_recipes, gradients

ALL_PARTS = ("projector", "cross_attention", "language_model")


def start_engine(
    name: str,
    parallel: ParallelConfig,
    trainable: tuple[str, ...] = ALL_PARTS,
    **changes: object,
) -> Engine:
    """Builds one of `cross_recipes.ALL` with weights that depend on names only, gates open."""
    model = cross_recipes.ALL[name]
    if model.cross_attention is None:
        trainable = tuple(part for part in trainable if part != "cross_attention")
    return gradients.start_engine(
        parallel,
        model=model,
        sequence_length=cross_recipes.SEQUENCE_LENGTH,
        trainable=trainable,
        **changes,
    )


def gradients_of_steps(
    name: str, parallel: ParallelConfig, rounds: int = 1, **changes: object
) -> tuple[list[float], gradients.Gradients]:
    """Returns losses of a mixed step and an all-text one, and on rank 0 their canonical gradients."""
    engine = start_engine(name, parallel, **changes)
    losses, found = [], []
    for number, packs in enumerate((cross_recipes.MIXED, cross_recipes.TEXT_ONLY)):
        batch = cross_recipes.step_batch(name, packs, engine.topology.share, number, rounds)
        loss, gathered = gradients.of_batch(engine, batch)
        losses.append(loss)
        found.append(gathered if dist.get_rank() == 0 else {})
    return losses, found


def losses_of_training(
    name: str, parallel: ParallelConfig, steps: int
) -> tuple[list[float], list[float]]:
    """Returns losses and gradient norms of real training steps."""
    engine = start_engine(name, parallel)
    losses, norms = [], []
    for number in range(steps):
        packs = cross_recipes.TEXT_ONLY if number == 2 else cross_recipes.MIXED
        batch = cross_recipes.step_batch(name, packs, engine.topology.share, number, 1)
        result = run_step(engine, place(batch, engine.topology), num_sources=2)
        losses.append(result.loss)
        norms.append(result.grad_norm)
    return losses, norms
