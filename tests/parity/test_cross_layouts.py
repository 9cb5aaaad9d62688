"""X and H: same weights, another layout, the same per-parameter gradients; gates at 0.5."""

from __future__ import annotations

import pytest

from nvlm_train.config.schema import ParallelConfig
from tests.model.cross_runs import together
from tests.parity import cross_bugs, cross_gradients, cross_recipes
from tests.parity.test_layouts import TOLERANCE, worst_error
from tests.workers import WorkerPool

LAYOUTS = {
    "single in two rounds": (1, ParallelConfig(), 2),
    "full recompute": (1, ParallelConfig(recompute="full"), 1),
    "norms recomputed": (1, ParallelConfig(recompute=("norms",)), 1),
    "MLP recomputed": (1, ParallelConfig(recompute=("mlp",)), 1),
    "attention recomputed": (1, ParallelConfig(recompute=("attention",)), 1),
    "TP2": (2, ParallelConfig(tensor=2), 1),
    "TP2 SP": (2, ParallelConfig(tensor=2, sequence_parallel=True), 1),
    "PP2": (2, ParallelConfig(pipeline=2), 1),
    "PP4": (4, ParallelConfig(pipeline=4), 1),
    "DP2": (2, ParallelConfig(), 1),
    "DP2 without overlap": (
        2,
        ParallelConfig(overlap_grad_reduce=False, overlap_param_gather=False),
        1,
    ),
    "TP2 PP2": (4, ParallelConfig(tensor=2, pipeline=2), 1),
    "TP2 SP PP2": (4, ParallelConfig(tensor=2, pipeline=2, sequence_parallel=True), 1),
    "PP2 DP2": (4, ParallelConfig(pipeline=2), 1),
    "PP2 DP2 without overlap": (4, ParallelConfig(pipeline=2, overlap_grad_reduce=False), 1),
    "TP2 SP PP2 full recompute": (
        4,
        ParallelConfig(tensor=2, pipeline=2, sequence_parallel=True, recompute="full"),
        1,
    ),
}


OPTIONS = ("x with feed-forward", "flamingo")
"""Variants beside the paper's models: their layouts run with the slow tests."""


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=[pytest.mark.slow] if name in OPTIONS else [])
        for name in cross_recipes.MODELS
    ],
)
def reference(request: pytest.FixtureRequest, workers: WorkerPool) -> tuple:
    """Returns the model's name, and losses and gradients of one process in one round."""
    run = workers.run(1, cross_gradients.gradients_of_steps, request.param, ParallelConfig())
    return request.param, *run[0]


FAST = ("full recompute", "PP4", "DP2 without overlap", "TP2 SP PP2")


@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in LAYOUTS],
)
def test_gradients_do_not_depend_on_layout(workers: WorkerPool, reference, layout: str) -> None:
    name, expected_losses, expected = reference
    world, parallel, rounds = LAYOUTS[layout]
    run = workers.run(world, cross_gradients.gradients_of_steps, name, parallel, rounds)
    losses, found = run[0]
    assert losses == pytest.approx(expected_losses, rel=1e-6)
    assert worst_error(*(map(together, steps) for steps in (found, expected))) < TOLERANCE


def test_reference_has_a_gradient_for_every_parameter(reference) -> None:
    _, _, (mixed, text_only) = reference
    crossing = {name for name in mixed if ".cross_" in name or ".pre_cross_" in name}
    assert len(crossing) in (12, 20)
    assert all(value.abs().max() > 0 for value in mixed.values())
    for name, value in text_only.items():
        carries_images = name in crossing or name.startswith(("projector.", "resampler."))
        assert (value.abs().max() > 0) != carries_images, name


@pytest.mark.parametrize("bug", cross_bugs.BUGS)
def test_deliberate_bugs_are_caught(workers: WorkerPool, reference, bug: str) -> None:
    name, _, expected = reference
    world, parallel = cross_bugs.BUGS[bug]
    _, found = workers.run(world, cross_bugs.gradients_with_bug, bug, name, parallel)[0]
    assert worst_error(*(map(together, steps) for steps in (found, expected))) > 100 * TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["TP2 SP PP2", "PP2 DP2 without overlap"])
def test_losses_of_training_do_not_depend_on_layout(
    workers: WorkerPool, reference, layout: str
) -> None:
    name, (world, parallel, _) = reference[0], LAYOUTS[layout]
    train = cross_gradients.losses_of_training
    expected, expected_norms = workers.run(1, train, name, ParallelConfig(), 5)[0]
    losses, norms = workers.run(world, train, name, parallel, 5)[0]
    assert losses == pytest.approx(expected, rel=1e-4)
    assert norms == pytest.approx(expected_norms, rel=1e-4)
    assert expected[-1] < expected[0]
