"""Same weights, another layout: the same per-parameter gradients. Losses alone miss real bugs."""

from __future__ import annotations

import math

import pytest
import torch

from nvlm_train.config.schema import ParallelConfig
from tests.parity import bugs, gradients
from tests.parity.gradients import Gradients
from tests.parity.recipes import STEPS
from tests.workers import WorkerPool

TOLERANCE = 1e-5
"""Of the largest value of each gradient, in fp32. 1e-6 is what is measured."""

NO_OVERLAP = ParallelConfig(overlap_grad_reduce=False, overlap_param_gather=False)
LAYOUTS = {
    "single in two rounds": (1, ParallelConfig(), 2),
    "full recompute": (1, ParallelConfig(recompute="full"), 1),
    "norms recomputed": (1, ParallelConfig(recompute=("norms",)), 1),
    "MLP recomputed": (1, ParallelConfig(recompute=("mlp",)), 1),
    "attention recomputed": (1, ParallelConfig(recompute=("attention",)), 1),
    "TP2": (2, ParallelConfig(tensor=2), 1),
    "TP2 SP": (2, ParallelConfig(tensor=2, sequence_parallel=True), 1),
    "PP2": (2, ParallelConfig(pipeline=2), 1),
    "PP2 in two rounds": (2, ParallelConfig(pipeline=2), 2),
    "PP4": (4, ParallelConfig(pipeline=4), 1),
    "DP2": (2, ParallelConfig(), 1),
    "DP2 without overlap": (
        2,
        NO_OVERLAP,
        1,
    ),
    "DP2 without overlap in two rounds": (
        2,
        NO_OVERLAP,
        2,
    ),
    "DP2 without distributed optimizer": (2, ParallelConfig(distributed_optimizer=False), 1),
    "TP2 PP2": (4, ParallelConfig(tensor=2, pipeline=2), 1),
    "TP2 SP PP2": (4, ParallelConfig(tensor=2, pipeline=2, sequence_parallel=True), 1),
    "PP2 DP2": (4, ParallelConfig(pipeline=2), 1),
    "PP2 DP2 without overlap": (4, ParallelConfig(pipeline=2, overlap_grad_reduce=False), 1),
    "TP2 SP DP2": (4, ParallelConfig(tensor=2, sequence_parallel=True), 1),
}


def worst_error(found: Gradients, expected: Gradients) -> float:
    """Returns the largest difference relative to the largest value, over parameters and steps."""
    worst = 0.0
    for step, whole in zip(found, expected, strict=True):
        assert step.keys() == whole.keys()
        for name, value in whole.items():
            scale = value.abs().max().item()
            difference = (step[name] - value).abs().max().item()
            assert not math.isnan(difference), f"{name}: a slice is missing"
            worst = max(worst, difference / scale if scale else difference)
    return worst


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_do_not_depend_on_layout(workers: WorkerPool, reference, layout: str) -> None:
    world, parallel, rounds = LAYOUTS[layout]
    losses, found = workers.run(world, gradients.gradients_of_step, parallel, STEPS, rounds)[0]
    assert losses == pytest.approx(reference[0], rel=1e-6)
    assert worst_error(found, reference[1]) < TOLERANCE


def test_reference_has_a_gradient_for_every_trainable_parameter(reference) -> None:
    mixed, text_only = reference[1]
    assert len(mixed) == 35
    assert all(value.abs().max() > 0 for value in mixed.values())
    for name, value in text_only.items():
        assert (value.abs().max() > 0) != name.startswith("projector."), name


@pytest.mark.parametrize("bug", bugs.BUGS)
def test_deliberate_bugs_are_caught(workers: WorkerPool, reference, bug: str) -> None:
    world, parallel = bugs.BUGS[bug]
    _, found = workers.run(world, bugs.gradients_with_bug, bug, parallel, STEPS)[0]
    assert worst_error(found, reference[1]) > 100 * TOLERANCE


@pytest.mark.parametrize(
    "layout",
    [
        "TP2 SP PP2",
        "DP2",
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in ("TP2 SP", "PP2", "DP2 without overlap", "PP2 DP2")
        ),
    ],
)
def test_losses_of_training_do_not_depend_on_layout(workers: WorkerPool, layout: str) -> None:
    world, parallel, _ = LAYOUTS[layout]
    expected, expected_norms = workers.run(1, gradients.losses_of_training, ParallelConfig(), 5)[0]
    losses, norms = workers.run(world, gradients.losses_of_training, parallel, 5)[0]
    assert losses == pytest.approx(expected, rel=1e-4)
    assert norms == pytest.approx(expected_norms, rel=1e-4)
    assert expected[-1] < expected[0]


def test_frozen_parts_are_bitwise_unchanged(workers: WorkerPool) -> None:
    """Pretraining trains the projector alone, so with PP2 the second stage has nothing to train."""
    for changed, unchanged, encoder_unchanged in workers.run(
        2, gradients.what_training_changes, ParallelConfig(pipeline=2), ("projector",)
    ):
        assert all(name.startswith("projector.") for name in changed)
        assert not any(name.startswith("projector.") for name in unchanged)
        assert encoder_unchanged
    (whole,) = workers.run(1, gradients.what_training_changes, ParallelConfig(), ("projector",))
    assert len(whole.changed) == 4 and len(whole.unchanged) == 31


def test_tile_features_do_not_depend_on_who_encodes(workers: WorkerPool) -> None:
    alone = workers.run(1, gradients.features_of_round, ParallelConfig())[0]
    for world, parallel in [
        (2, ParallelConfig(tensor=2)),
        (2, ParallelConfig(pipeline=2)),
        (4, ParallelConfig(tensor=2, pipeline=2)),
    ]:
        by_rank = workers.run(world, gradients.features_of_round, parallel)
        for rank, features in enumerate(by_rank):
            if rank < parallel.tensor:
                assert all(torch.equal(a, b) for a, b in zip(features, alone, strict=True))
            else:
                assert features is None
