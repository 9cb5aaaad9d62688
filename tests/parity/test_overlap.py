"""Communication that overlaps with computing changes no number, and no pack makes it hang.

The steps are a mixed one, an all-text one, one in which one replica has tiles and the other none, and a
mixed one; buckets are small, so that there are many.
"""

from __future__ import annotations

import math

import pytest

from nvlm_train.config.schema import ParallelConfig
from tests.parity import overlapped
from tests.parity.gradients import Gradients
from tests.parity.overlapped import Outcome
from tests.workers import WorkerPool

TOLERANCE = 1e-5
"""Of the largest value of each gradient, in fp32. 1e-6 is what is measured."""
WEIGHT_TOLERANCE = 5e-5
"""Of the largest value of each weight. The bias of keys has next to no gradient, and Adam makes whole steps
of its rounding errors: 1e-5 is what is measured there, 1e-6 elsewhere."""

LAYOUTS = {
    "DP2": (2, {}),
    "TP2 SP DP2": (4, {"tensor": 2, "sequence_parallel": True}),
    "PP2 DP2": (4, {"pipeline": 2}),
}
PROJECTOR = ("projector",)


def worst_error(found: Gradients, expected: Gradients) -> float:
    """Returns the largest difference relative to the largest value, over parameters and steps.

    A gate is one number, whose gradient in some step is a sum that cancels to 4e-6 by chance. So a value
    counts as at least a thousandth of the largest gradient.
    """
    worst = 0.0
    for step, whole in zip(found, expected, strict=True):
        assert step.keys() == whole.keys()
        largest = max(value.abs().max().item() for value in whole.values())
        for name, value in whole.items():
            difference = (step[name] - value).abs().max().item()
            assert not math.isnan(difference), f"{name}: a slice is missing"
            scale = max(value.abs().max().item(), largest / 1000)
            worst = max(worst, difference / scale if scale else difference)
    return worst


CASES = [
    pytest.param(name, layout, 1, trainable, marks=() if is_fast else pytest.mark.slow)
    for name, layout, trainable, is_fast in (
        ("d", "DP2", None, False),
        ("d", "TP2 SP DP2", None, False),
        ("d", "PP2 DP2", None, True),
        ("d", "DP2", PROJECTOR, False),
        ("d", "PP2 DP2", PROJECTOR, False),
        ("x", "DP2", None, False),
        ("x", "TP2 SP DP2", None, False),
        ("x", "PP2 DP2", None, False),
        ("x", "DP2", ("projector", "cross_attention"), True),
        ("h", "DP2", None, False),
        ("h", "TP2 SP DP2", None, False),
        ("h", "PP2 DP2", None, False),
        ("x with feed-forward", "DP2", None, False),
        ("flamingo", "DP2", None, False),
    )
] + [pytest.param("x", "DP2", 2, None, marks=pytest.mark.slow)]


def run(
    workers: WorkerPool,
    world: int,
    name: str,
    parallel: ParallelConfig,
    rounds: int = 1,
    **more: object,
) -> Outcome:
    """Returns what rank 0 found."""
    return workers.run(world, overlapped.outcome_of, name, parallel, rounds, more)[0]


@pytest.mark.parametrize(("name", "layout", "rounds", "trainable"), CASES)
def test_overlap_changes_no_number(
    workers: WorkerPool, name: str, layout: str, rounds: int, trainable: tuple[str, ...] | None
) -> None:
    """Gradients of each step, and weights after all of them: one process, and the layout without overlap."""
    world, sizes = LAYOUTS[layout]
    more = {} if trainable is None else {"trainable": trainable}
    found = run(workers, world, name, ParallelConfig(**sizes), rounds, **more)
    off = {"overlap_grad_reduce": False, "overlap_param_gather": False}
    for expected in (
        run(workers, 1, name, ParallelConfig(), **more),
        run(workers, world, name, ParallelConfig(**sizes, **off), **more),
    ):
        assert expected.buckets == 1 < found.buckets
        assert found.losses == pytest.approx(expected.losses, rel=1e-6)
        assert found.norms == pytest.approx(expected.norms, rel=1e-5)
        assert worst_error(found.gradients, expected.gradients) < TOLERANCE
        assert worst_error([found.weights], [expected.weights]) < WEIGHT_TOLERANCE


@pytest.mark.parametrize("layout", ["DP2", pytest.param("PP2 DP2", marks=pytest.mark.slow)])
def test_a_step_that_is_left_out_leaves_no_bucket_behind(workers: WorkerPool, layout: str) -> None:
    """After it nothing was updated, and weights are gathered all the same, on all ranks alike."""
    world, sizes = LAYOUTS[layout]
    found = run(workers, world, "x", ParallelConfig(**sizes), broken_step=1)
    expected = run(workers, 1, "x", ParallelConfig(), broken_step=1)
    updated = run(workers, 1, "x", ParallelConfig())
    assert worst_error([found.weights], [expected.weights]) < WEIGHT_TOLERANCE
    assert worst_error([updated.weights], [expected.weights]) > 10 * WEIGHT_TOLERANCE


def test_weights_that_are_read_too_early_are_caught(workers: WorkerPool) -> None:
    """Negative controls: a forward pass, and a save, that do not wait for the weights."""
    expected = run(workers, 1, "x", ParallelConfig())
    for bug in (
        "weights are read before they are gathered",
        "weights are saved before they are gathered",
    ):
        found = workers.run(2, overlapped.outcome_with_bug, bug, "x", ParallelConfig())[0]
        assert worst_error([found.weights], [expected.weights]) > 10 * WEIGHT_TOLERANCE, bug


@pytest.mark.slow
@pytest.mark.parametrize(
    "bug",
    [
        "a module that packs pass by gathers its own weights only",
        "buckets start when they are ready",
    ],
)
def test_orders_that_differ_between_replicas_are_caught(bug: str) -> None:
    """Negative controls: megatron-core's own order, in the step in which one replica has text only."""
    workers = WorkerPool(2)
    try:
        with pytest.raises(AssertionError):
            workers.run(2, overlapped.outcome_with_bug, bug, "x", ParallelConfig(), timeout=60)
    finally:
        workers.close()
