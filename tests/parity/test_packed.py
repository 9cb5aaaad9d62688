"""One kernel for a whole pack: the same gradients as one call a segment and a span, in a whole model."""

from __future__ import annotations

import pytest

from nvlm_train.config.schema import ParallelConfig
from tests.model.cross_runs import together
from tests.parity import cross_gradients, packed
from tests.parity.test_layouts import TOLERANCE, worst_error
from tests.workers import WorkerPool

LAYOUTS = {
    "single": (1, ParallelConfig()),
    "full recompute": (1, ParallelConfig(recompute="full")),
    "TP2 SP PP2": (4, ParallelConfig(tensor=2, pipeline=2, sequence_parallel=True)),
}
FAST = {("h", "single"), ("x with feed-forward", "single")}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(name, layout, marks=[] if (name, layout) in FAST else pytest.mark.slow)
        for name in ("d beside x", "x", "h", "h with large heads", "x with feed-forward")
        for layout in LAYOUTS
    ],
)
def test_gradients_are_those_of_single_calls(workers: WorkerPool, name: str, layout: str) -> None:
    world, parallel = LAYOUTS[layout]
    losses, found = workers.run(world, packed.gradients_of_steps, name, parallel)[0]
    single = workers.run(1, cross_gradients.gradients_of_steps, name, ParallelConfig())
    expected_losses, expected = single[0]
    assert losses == pytest.approx(expected_losses, rel=1e-6)
    assert worst_error(*(map(together, steps) for steps in (found, expected))) < TOLERANCE


def test_a_mask_that_leaks_is_caught(workers: WorkerPool) -> None:
    arguments = ("h", ParallelConfig())
    _, found = workers.run(1, packed.gradients_with_a_leak, *arguments)[0]
    _, expected = workers.run(1, cross_gradients.gradients_of_steps, *arguments)[0]
    assert worst_error(*(map(together, steps) for steps in (found, expected))) > 100 * TOLERANCE
