"""bf16, the precision of GPUs: the gradients of fp32 but for rounding, in every layout."""

from __future__ import annotations

from functools import partial

import pytest

from nvlm_train.config.schema import ParallelConfig
from tests.model.cross_runs import together
from tests.parity import cross_gradients, gradients
from tests.parity.gradients import Gradients
from tests.parity.recipes import STEPS
from tests.workers import WorkerPool

TOLERANCE = 0.05
"""Of each gradient's norm. 0.02 is measured; the bugs of bugs.py are off by 0.12 to 2.9."""

EVERY_PARALLELISM = ParallelConfig(tensor=2, sequence_parallel=True, pipeline=2)
LAYOUTS = {
    "single": (1, ParallelConfig()),
    "full recompute": (1, ParallelConfig(recompute="full")),
    "PP2": (2, ParallelConfig(pipeline=2)),
    "DP2 without overlap": (
        2,
        ParallelConfig(overlap_grad_reduce=False, overlap_param_gather=False),
    ),
    "DP2 without distributed optimizer": (2, ParallelConfig(distributed_optimizer=False)),
    "TP2 SP PP2": (4, EVERY_PARALLELISM),
}
FAST = ("DP2 without overlap", "TP2 SP PP2")
slow = pytest.mark.slow


def worst_distance(found: Gradients, expected: Gradients) -> float:
    """Returns the largest distance relative to the norm, over parameters and steps; a zero must stay zero."""
    worst = 0.0
    for step, whole in zip(found, expected, strict=True):
        assert step.keys() == whole.keys()
        for name, value in whole.items():
            distance, norm = (step[name] - value).norm().item(), value.norm().item()
            assert norm or not distance, name
            worst = max(worst, distance / norm if norm else 0.0)
    return worst


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[] if name in FAST else [slow]) for name in LAYOUTS]
)
def test_gradients_of_d_are_near_those_of_fp32(workers: WorkerPool, reference, layout: str) -> None:
    expected_losses, expected = reference
    in_bf16 = partial(gradients.gradients_of_step, precision="bf16")
    losses, found = workers.run(LAYOUTS[layout][0], in_bf16, LAYOUTS[layout][1], STEPS)[0]
    assert losses == pytest.approx(expected_losses, rel=2e-3)
    assert worst_distance(found, expected) < TOLERANCE


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("x", marks=slow),
        "h",
        *(pytest.param(n, marks=slow) for n in ("x with feed-forward", "flamingo")),
    ],
)
def test_gradients_of_x_and_h_are_near_those_of_fp32(workers: WorkerPool, name: str) -> None:
    expected_losses, expected = workers.run(
        1, cross_gradients.gradients_of_steps, name, ParallelConfig()
    )[0]
    in_bf16 = partial(cross_gradients.gradients_of_steps, precision="bf16")
    losses, found = workers.run(4, in_bf16, name, EVERY_PARALLELISM)[0]
    assert losses == pytest.approx(expected_losses, rel=2e-3)
    assert (
        worst_distance(*([together(step) for step in each] for each in (found, expected)))
        < TOLERANCE
    )


@slow
def test_training_is_near_that_of_fp32(workers: WorkerPool) -> None:
    expected = workers.run(1, gradients.losses_of_training, ParallelConfig(), 5)[0]
    in_bf16 = partial(gradients.losses_of_training, precision="bf16")
    losses, norms = workers.run(4, in_bf16, EVERY_PARALLELISM, 5)[0]
    assert losses == pytest.approx(expected[0], rel=2e-3)
    assert norms == pytest.approx(expected[1], rel=2e-2)
