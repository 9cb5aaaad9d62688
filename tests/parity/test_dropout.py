"""Dropout: one mask for forward and backward in every layout, one for each rank where they must differ."""

from __future__ import annotations

import pytest
import torch

from nvlm_train.config.schema import ParallelConfig
from tests.model.cross_runs import together
from tests.parity import dropout_bugs, dropout_runs, recipes
from tests.parity.dropout_runs import ALL, Rates
from tests.parity.test_layouts import TOLERANCE, worst_error
from tests.workers import WorkerPool

SLOPE_TOLERANCE = 0.01
"""Of each slope. 0.004 is measured: what finite differences in fp32 leave."""
NOISE = 1e-5
"""1e-6 is measured at gates, whose slopes are 3e-4."""

slow = pytest.mark.slow
TP2, TP2_SP = ParallelConfig(tensor=2), ParallelConfig(tensor=2, sequence_parallel=True)
PP2 = ParallelConfig(pipeline=2)
LAYOUTS = {
    "single": (1, ParallelConfig()),
    "TP2": (2, TP2),
    "TP2 SP": (2, TP2_SP),
    "PP2": (2, PP2),
    "DP2": (2, ParallelConfig()),
    "TP2 SP PP2": (4, ParallelConfig(tensor=2, pipeline=2, sequence_parallel=True)),
    "TP2 SP DP2": (4, TP2_SP),
}
"""Name -> world size and layout."""
MODELS = ("d", "x", "h", "x with feed-forward", "flamingo")


ALIKE = ("x", "flamingo")
"""Models whose every kind of dropout others have too: tried in two layouts only."""


def cases(fast: set[tuple[str, str]], layouts: tuple[str, ...]) -> list:
    """Returns models in layouts. All but some are marked slow."""
    return [
        pytest.param(name, layout, marks=[] if (name, layout) in fast else [slow])
        for name in MODELS
        for layout in layouts
        if name not in ALIKE or layout in ("TP2 SP", "TP2 SP PP2")
    ]


def difference(found: tuple, expected: tuple) -> float:
    """Returns the largest error of a parameter's gradient. The gates of X and H count as one vector."""
    pair = [each[1] for each in (found, expected)]
    if any(key.endswith("alpha") for key in expected[1]):
        pair = [together(each) for each in pair]
    return worst_error(pair[:1], pair[1:])


@pytest.mark.parametrize(
    ("name", "layout"),
    cases({("d", "TP2 SP")}, tuple(LAYOUTS)),
)
def test_gradients_are_finite_differences(workers: WorkerPool, name: str, layout: str) -> None:
    """All kinds of dropout are on: the backward must agree with a small step under the same masks."""
    slopes = workers.run(LAYOUTS[layout][0], dropout_runs.slopes, name, LAYOUTS[layout][1], ALL)[0]
    assert len(slopes) >= 35
    for key, (by_backward, by_differences) in slopes.items():
        assert by_differences == pytest.approx(by_backward, rel=SLOPE_TOLERANCE, abs=NOISE), key


@pytest.mark.parametrize("bug", dropout_bugs.SLOPES)
def test_wrong_gradients_are_caught(workers: WorkerPool, bug: str) -> None:
    """Negative control: with the bug at least one parameter is far off."""
    name, layout = dropout_bugs.SLOPES[bug]
    slopes = workers.run(
        LAYOUTS[layout][0], dropout_bugs.slopes_with_bug, bug, name, LAYOUTS[layout][1], ALL
    )[0]
    worst = max(abs(one - other) / abs(one) for one, other in slopes.values())
    assert worst > 10 * SLOPE_TOLERANCE


SAME_MASKS = {
    "hidden dropout is replicated": (TP2, Rates(words=0.1, hidden=0.1)),
    "words are dropped before they are scattered": (TP2_SP, Rates(words=0.1)),
    "the first pipeline stage has the generator of a single one": (PP2, Rates(words=0.1)),
}
"""What does not depend on the layout, by Megatron's rules."""


@pytest.mark.parametrize("rule", SAME_MASKS)
@pytest.mark.parametrize("name", ["d", *(pytest.param(n, marks=slow) for n in MODELS if n != "d")])
def test_masks_that_do_not_depend_on_the_layout(workers: WorkerPool, name: str, rule: str) -> None:
    """Losses and gradients per parameter are those of one process."""
    parallel, rates = SAME_MASKS[rule]
    expected = workers.run(1, dropout_runs.gradients_of, name, ParallelConfig(), rates)[0]
    found = workers.run(2, dropout_runs.gradients_of, name, parallel, rates)[0]
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert difference(found, expected) < TOLERANCE
    none = workers.run(1, dropout_runs.gradients_of, name, ParallelConfig(), Rates())[0]
    assert abs(none[0] - expected[0]) > 1e-4, "dropout must count"


def test_masks_of_words_by_rank_are_caught(workers: WorkerPool) -> None:
    """Negative control: megatron-core's own embedding under sequence parallelism."""
    rates = Rates(words=0.1)
    expected = workers.run(1, dropout_runs.gradients_of, "d", ParallelConfig(), rates)[0]
    bug = "each rank drops words by itself"
    found = workers.run(2, dropout_bugs.gradients_with_bug, bug, "d", TP2_SP, rates)[0]
    assert difference(found, expected) > 100 * TOLERANCE


RECOMPUTED = ("single", "TP2", "TP2 SP", "TP2 SP PP2")


@pytest.mark.parametrize(
    "recompute",
    ["full", ("norms", "mlp"), pytest.param(("attention",), marks=slow)],
)
@pytest.mark.parametrize(("name", "layout"), cases({("h", "TP2 SP")}, RECOMPUTED))
def test_recomputation_draws_the_same_masks(
    workers: WorkerPool, name: str, layout: str, recompute: str | tuple[str, ...]
) -> None:
    world, parallel = LAYOUTS[layout]
    again = recipes.with_parallel(parallel, recompute=recompute)
    expected = workers.run(world, dropout_runs.gradients_of, name, parallel, ALL)[0]
    found = workers.run(world, dropout_runs.gradients_of, name, again, ALL)[0]
    assert found[0] == expected[0]
    assert difference(found, expected) < TOLERANCE


def test_other_masks_at_recomputation_are_caught(workers: WorkerPool) -> None:
    """Negative control: a second fork under sequence parallelism, which changes no loss."""
    full = recipes.with_parallel(TP2_SP, recompute="full")
    bug = "attention forks under sequence parallelism too"
    expected, found = (
        workers.run(2, dropout_bugs.gradients_with_bug, bug, "h", parallel, ALL)[0]
        for parallel in (TP2_SP, full)
    )
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert difference(found, expected) > 100 * TOLERANCE


@pytest.mark.parametrize("parallel", [pytest.param(TP2, marks=slow), TP2_SP], ids=["TP2", "TP2 SP"])
def test_heads_of_each_rank_have_masks_of_their_own(
    workers: WorkerPool, parallel: ParallelConfig
) -> None:
    """It holds in self-attention, the last layer's rows and cross-attention. Equal seeds give equal masks."""
    first, second = workers.run(2, dropout_runs.attention_masks, "h", parallel)
    assert len(first) == 4 + 2
    for number, (one, other) in enumerate(zip(first, second, strict=True)):
        assert one.shape == other.shape
        assert not torch.equal(one, other), number
        assert one.std() > 0
    again = workers.run(2, dropout_runs.attention_masks, "h", parallel)
    assert all(torch.equal(a, b) for a, b in zip(again[0], first, strict=True))


def test_heads_with_one_mask_are_caught(workers: WorkerPool) -> None:
    """Negative control: attention draws from the generator that all tensor-parallel ranks share."""
    masks = workers.run(2, dropout_bugs.attention_masks_of_all_ranks, "h", TP2)
    assert all(torch.equal(one, other) for one, other in zip(*masks, strict=True))


@slow
def test_residual_streams_of_each_rank(workers: WorkerPool) -> None:
    """Whole streams share one mask; parts of a sequence, replicas and pipeline stages have their own."""
    whole = workers.run(2, dropout_runs.hidden_masks, "h", TP2)
    assert all(torch.equal(one, other) for one, other in zip(*whole, strict=True))
    parts = workers.run(2, dropout_runs.hidden_masks, "h", TP2_SP)
    words = 2  # of the sequence, of the context's tags: whole before the scatter
    for number, (one, other) in enumerate(zip(*parts, strict=True)):
        assert torch.equal(one, other) == (number < words), number
    replicas = workers.run(2, dropout_runs.hidden_masks, "h", ParallelConfig())
    assert not any(torch.equal(one, other) for one, other in zip(*replicas, strict=True))
    first, last = workers.run(2, dropout_runs.hidden_masks, "h", PP2)
    drawn = [mask for mask in first[words:] if mask.shape == last[0].shape]
    assert not any(torch.equal(mask, last[0]) for mask in drawn) and drawn
