"""Dropout on a GPU, whose masks are other than a CPU's: what holds of any masks.

Backward has the masks of forward, recomputation draws them again, and as many are dropped as the recipe says.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from nvlm_train.config.schema import ParallelConfig
from tests.gpu import attention_masks, gradient_runs
from tests.gpu.attention_masks import Masks
from tests.gpu.gradient_runs import DROPOUT, Found
from tests.gpu.paths import CPU, CPU_BF16, FAST, GPU, RECOMPUTE, TOLERANCE, D, H, Path, X
from tests.parity.test_bf16 import worst_distance
from tests.parity.test_dropout import NOISE, SLOPE_TOLERANCE
from tests.workers import WorkerPool

RATE = 0.1
AGREES = {"fp32": 1e-4, "bf16": 0.05}
"""For `disagreements`. bf16: products, weights and gradients are each rounded by 2e-3."""
OTHER_MASKS = 0.3
"""What two masks that have nothing in common are at least apart, as the root of the mean square."""
AGAIN = "recomputation draws other masks"

Run = Callable[[dict[str, object], ParallelConfig], Found]


def check_recomputation(run: Run, precision: str) -> None:
    """Compares every form of recomputation with none, and dropout with none.

    Forward is the same, but for the order in which a GPU may add; gradients are sums of other roundings.
    """
    kept = run(DROPOUT, ParallelConfig())
    plain = run({}, ParallelConfig())
    assert worst_distance(kept.gradients, plain.gradients) > 2 * TOLERANCE["bf16"]
    for form, parallel in RECOMPUTE.items():
        again = run(DROPOUT, parallel)
        assert again.losses == pytest.approx(kept.losses, rel=1e-5), form
        assert worst_distance(again.gradients, kept.gradients) < TOLERANCE[precision], form


def check_rate(masks: Masks) -> None:
    """Checks the mean and the variance of what dropout leaves, over 10,000 rows of attention and more."""
    assert masks.mean == pytest.approx(1, abs=0.02)
    assert masks.variance == pytest.approx(RATE / (1 - RATE), rel=0.15)
    assert masks.equal_heads < 0.5


@pytest.mark.gpu
@pytest.mark.parametrize("path", GPU)
def test_recomputation_on_a_gpu_draws_the_same_masks(gpu: WorkerPool, path: str) -> None:
    def run(changes: dict[str, object], parallel: ParallelConfig) -> Found:
        return gpu.run(1, gradient_runs.with_changes, H, GPU[path], parallel, changes)[0]

    check_recomputation(run, GPU[path].precision)


@pytest.mark.gpu
@pytest.mark.parametrize("path", FAST)
def test_other_masks_at_recomputation_are_caught_on_a_gpu(gpu: WorkerPool, path: str) -> None:
    """Negative control: backward goes on from the state that the generators have by then."""
    check_caught(gpu, FAST[path])


def check_caught(pool: WorkerPool, path: Path) -> None:
    kept, again = (
        pool.run(1, gradient_runs.with_bug_and_dropout, AGAIN, H, path, parallel)[0]
        for parallel in (ParallelConfig(), RECOMPUTE["whole layers"])
    )
    assert worst_distance(again.gradients, kept.gradients) > 2 * TOLERANCE["bf16"]


@pytest.mark.gpu
@pytest.mark.parametrize("path", GPU)
def test_a_gpu_drops_what_the_recipe_says(gpu: WorkerPool, path: str) -> None:
    check_rate(gpu.run(1, attention_masks.rates_of, D, GPU[path], RATE)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("path", GPU)
def test_backward_on_a_gpu_has_the_masks_of_forward(gpu: WorkerPool, path: str) -> None:
    (found,) = gpu.run(1, attention_masks.disagreements, D, GPU[path], 0.5)
    assert len(found) >= 8 and max(found) < AGREES[GPU[path].precision]


@pytest.mark.gpu
@pytest.mark.parametrize("name", [D, X, H])
def test_gradients_on_a_gpu_are_finite_differences(gpu: WorkerPool, name: str) -> None:
    """Cross-attention, words and branches too, in fp32; bf16 would round the step away."""
    (slopes,) = gpu.run(1, gradient_runs.slopes, name, GPU["torch fp32"])
    check_slopes(slopes)


def check_slopes(slopes: dict[str, tuple[float, float]]) -> None:
    assert len(slopes) >= 35
    for key, (by_backward, by_differences) in slopes.items():
        assert by_differences == pytest.approx(by_backward, rel=SLOPE_TOLERANCE, abs=NOISE), key


@pytest.mark.slow
def test_recomputation_draws_the_same_masks(workers: WorkerPool) -> None:
    def run(changes: dict[str, object], parallel: ParallelConfig) -> Found:
        return workers.run(1, gradient_runs.with_changes, H, CPU, parallel, changes)[0]

    check_recomputation(run, "fp32")


@pytest.mark.slow
def test_other_masks_at_recomputation_are_caught(workers: WorkerPool) -> None:
    check_caught(workers, CPU)


def test_what_the_recipe_says_is_dropped(workers: WorkerPool) -> None:
    check_rate(workers.run(1, attention_masks.rates_of, D, CPU, RATE)[0])


@pytest.mark.slow
def test_another_rate_is_caught(workers: WorkerPool) -> None:
    """Negative control: the check would see 0.13 instead of 0.1."""
    (masks,) = workers.run(1, attention_masks.rates_of, D, CPU, 1.3 * RATE)
    with pytest.raises(AssertionError):
        check_rate(masks)


@pytest.mark.parametrize("path", [CPU, CPU_BF16], ids=["fp32", "bf16"])
def test_backward_has_the_masks_of_forward(workers: WorkerPool, path: Path) -> None:
    (found,) = workers.run(1, attention_masks.disagreements, D, path, 0.5)
    assert len(found) >= 8 and max(found) < AGREES[path.precision]


def test_other_masks_in_backward_are_caught(workers: WorkerPool) -> None:
    """Negative control."""
    bug = "the backward of attention draws other masks"
    (found,) = workers.run(1, attention_masks.disagreements_with_bug, bug, D, CPU_BF16, 0.5)
    assert math.sqrt(sum(each**2 for each in found) / len(found)) > OTHER_MASKS


@pytest.mark.slow
def test_gradients_are_finite_differences(workers: WorkerPool) -> None:
    check_slopes(workers.run(1, gradient_runs.slopes, H, CPU)[0])
