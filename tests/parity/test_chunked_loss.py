"""Chunks of the vocabulary change no gradient of a step, in any layout."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

from nvlm_train.config.schema import ParallelConfig
from tests.parity import chunked_loss, gradients
from tests.parity.recipes import LANGUAGE, MODEL, STEPS
from tests.parity.test_layouts import TOLERANCE, worst_error
from tests.workers import WorkerPool

LAYOUTS = {
    "single": (1, ParallelConfig()),
    "DP2 overlapped": (2, ParallelConfig(overlap_grad_reduce=True)),
    "TP2 SP PP2": (4, ParallelConfig(tensor=2, pipeline=2, sequence_parallel=True)),
}
TIED = replace(MODEL, language=replace(LANGUAGE, tied_embeddings=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_of_one_chunk(workers: WorkerPool, reference, layout: str) -> None:
    world, parallel = LAYOUTS[layout]
    by_rank = workers.run(world, chunked_loss.gradients_of_step, parallel, STEPS)
    losses, found, _ = by_rank[0]
    # 256 rows by 48, 128 of each of two ranks.
    assert max(most for _, _, most in by_rank) == (3 if parallel.tensor == 2 else 6)
    assert losses == pytest.approx(reference[0], rel=1e-6)
    assert worst_error(found, reference[1]) < TOLERANCE


@pytest.mark.parametrize("layout", ["DP2 overlapped", "TP2 SP PP2"])
def test_a_tied_table_gets_both_gradients(workers: WorkerPool, layout: str) -> None:
    world, parallel = LAYOUTS[layout]
    losses, expected = workers.run(
        1, partial(gradients.gradients_of_step, model=TIED), ParallelConfig(), STEPS
    )[0]
    run = partial(chunked_loss.gradients_of_step, model=TIED)
    found_losses, found, _ = workers.run(world, run, parallel, STEPS)[0]
    assert found_losses == pytest.approx(losses, rel=1e-6)
    assert worst_error(found, expected) < TOLERANCE


def test_a_frozen_table_changes_no_other_gradient(workers: WorkerPool) -> None:
    """As in pretraining: the language model is frozen, and gradients go through it."""
    only = {"trainable": ("projector",)}
    losses, expected = workers.run(
        1, partial(gradients.gradients_of_step, **only), ParallelConfig(), STEPS
    )[0]
    run = partial(chunked_loss.gradients_of_step, **only)
    world, parallel = LAYOUTS["TP2 SP PP2"]
    found_losses, found, _ = workers.run(world, run, parallel, STEPS)[0]
    assert found_losses == pytest.approx(losses, rel=1e-6)
    assert worst_error(found, expected) < TOLERANCE
    assert all(name.startswith("projector.") for name in found[0])
