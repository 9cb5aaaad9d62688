"""Packs longer than samples: the same samples a step, in packs that are full, alike and of few lengths."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import made_sources
from benchmarks.made_sources import NoEncoder
from benchmarks.plan import make_blend
from nvlm_train import costs, geometry
from nvlm_train.batch import PackPlan, StepPlan
from nvlm_train.config.schema import BatchConfig, ParallelConfig, StageConfig
from nvlm_train.costs import StepWork
from nvlm_train.data.plan.attention_cost import AttentionCost, attention_cost
from nvlm_train.data.plan.balance import SLACK, even_out
from nvlm_train.data.plan.packing import (
    Packing,
    SampleSizes,
    best_fit_decreasing,
    deal,
    spread,
)
from nvlm_train.data.plan.plan import DataPlan
from nvlm_train.data.plan.sources import open_sources
from nvlm_train.data.plan.statistics import imbalance, rank_loads
from nvlm_train.data.samples.encoder import SampleEncoder
from nvlm_train.data.shards.store import Store
from tests.data.conftest import LENGTH
from tests.data.plan.test_plan import PACKS, SAMPLES, MakePlan, identity, samples_of
from tests.parity import cross_recipes, recipes

LENGTHS = (LENGTH, 2 * LENGTH, 3 * LENGTH)


def stage(sequence_length: int, pack_length: int | None, tensor: int = 1) -> StageConfig:
    own = recipes.stage(ParallelConfig(tensor=tensor))
    return replace(own, sequence_length=sequence_length, pack_length=pack_length)


# ---- lengths ----


def test_without_a_pack_length_there_is_one_length() -> None:
    assert geometry.pack_lengths(stage(127, None)) == (127,)
    assert geometry.pack_lengths(stage(1000, 1000, tensor=8)) == (1000,)


def test_lengths_are_few_and_hold_any_sample() -> None:
    assert geometry.pack_lengths(stage(3200, 4096, tensor=8)) == (3200, 3584, 4096)
    assert geometry.pack_lengths(stage(100, 4096)) == tuple(range(512, 4097, 512))
    # Whatever tensor parallelism is, it divides; the longest is the recipe's, which a rule checks.
    assert geometry.pack_lengths(stage(500, 1200, tensor=3)) == (576, 768, 960, 1152, 1200)


@given(st.integers(1, 5000), st.integers(0, 20_000), st.sampled_from([1, 2, 3, 8]))
def test_lengths_of_any_recipe(sequence_length: int, more: int, tensor: int) -> None:
    longest = sequence_length + more
    lengths = geometry.pack_lengths(stage(sequence_length, longest, tensor))
    assert len(lengths) <= 8 and list(lengths) == sorted(set(lengths))
    assert lengths[0] >= sequence_length and lengths[-1] == longest
    assert all(length % tensor == 0 for length in lengths[:-1])
    for tokens in (1, sequence_length, longest):
        assert geometry.length_for(tokens, lengths) >= tokens


# ---- what attention costs ----


@pytest.mark.parametrize("name", ["d beside x", "x", "h", "flamingo"])
def test_attention_costs_what_step_flops_says(name: str) -> None:
    model, own = cross_recipes.ALL[name], recipes.stage(ParallelConfig())
    found = attention_cost(model)

    def flops(**counts: int) -> float:
        none = {"tokens": 0, "attention_pairs": 0, "trained_tokens": 0, "tiles": 0}
        return costs.step_flops(model, own, StepWork(**none | counts))

    unit = flops(attention_pairs=1) / found.per_pair
    context = geometry.context_tokens_per_tile(model)
    if model.cross_attention is None:
        assert found.per_tile_and_token == 0
    else:
        assert flops(cross_pairs=context) == pytest.approx(unit * found.per_tile_and_token)
    assert found.tiles_in_decoder == (model.architecture != "x")


# ---- properties ----

SIZES = st.lists(st.tuples(st.integers(1, 100), st.integers(0, 7)), min_size=1, max_size=60)


def sizes_of(pairs: Sequence[tuple[int, int]]) -> SampleSizes:
    tokens, tiles = (np.array(column, dtype=np.int64) for column in zip(*pairs, strict=True))
    return SampleSizes(tokens, tiles, tokens**2)


@settings(max_examples=150, deadline=None)
@given(SIZES, st.integers(1, 30), st.sampled_from([None, 7, 20]))
def test_spread_loses_nothing_and_overfills_nothing(
    pairs: list[tuple[int, int]], wanted: int, max_tiles: int | None
) -> None:
    samples, lengths = sizes_of(pairs), (100, 150, 200)
    tokens, tiles = samples.tokens.tolist(), samples.tiles.tolist()
    fewest = best_fit_decreasing(tokens, 200, tiles, max_tiles)
    groups = spread(fewest, wanted, samples, lengths, max_tiles)
    assert sorted(i for group in groups for i in group) == list(range(len(pairs)))
    assert all(groups) and len(groups) <= max(len(fewest), min(wanted, len(pairs)))
    assert all(sum(tokens[i] for i in group) <= 200 for group in groups)
    assert max_tiles is None or all(sum(tiles[i] for i in g) <= max_tiles for g in groups)
    assert groups == spread(fewest, wanted, samples, lengths, max_tiles)


@settings(max_examples=150, deadline=None)
@given(SIZES, st.integers(1, 9))
def test_evening_out_never_raises_the_highest_load(
    pairs: list[tuple[int, int]], num_groups: int
) -> None:
    samples = sizes_of(pairs)
    sizes = np.stack([samples.tiles, samples.attention, samples.tokens], axis=1)
    groups = [list(range(first, len(pairs), num_groups)) for first in range(num_groups)]
    before = np.array([sizes[own].sum(axis=0) for own in groups])
    counts = [len(own) for own in groups]
    even_out(groups, sizes)
    after = np.array([sizes[own].sum(axis=0) for own in groups])
    assert [len(own) for own in groups] == counts
    assert sorted(i for own in groups for i in own) == list(range(len(pairs)))
    # Of the first measure never; the later ones may pay for it.
    assert after[:, 0].max() <= max(before[:, 0].max(), before[:, 0].mean() * (1 + SLACK))


# ---- plans ----


def with_packs(plan: DataPlan, lengths: tuple[int, ...], batch: BatchConfig) -> DataPlan:
    return DataPlan(
        plan.sources, batch, LENGTH, plan.seed, 0.0, None, Packing(lengths, AttentionCost(4, 9))
    )


def test_a_step_of_samples_keeps_its_samples(make_plan: MakePlan) -> None:
    """The batch of the paper is so many samples, and stays those samples, in any packs on any ranks."""
    plan = make_plan(SAMPLES)
    longer = with_packs(plan, LENGTHS, SAMPLES)
    for step in (0, 3, 17):
        expected = identity(samples_of(plan.step(step, 1)))
        for dp_size in (1, 2, 3, 4, 8, 16):
            found = longer.step(step, dp_size)
            assert identity(samples_of(found)) == expected
            counts = [sum(bool(pack.samples) for pack in own) for own in found.packs]
            assert len(set(counts)) == 1 and counts[0] >= 1, "every rank has equally many"
            packs = [pack for own in found.packs for pack in own]
            assert found.pack_length in LENGTHS
            longest = max(pack.num_tokens for pack in packs)
            assert found.pack_length == geometry.length_for(longest, LENGTHS)
    assert len(longer.step(0, 1).packs[0]) < len(plan.step(0, 1).packs[0])


def test_a_step_of_packs_has_as_many_packs_of_more_samples(make_plan: MakePlan) -> None:
    plan = make_plan(PACKS)
    longer = with_packs(plan, LENGTHS, PACKS)
    for step in (0, 7):
        found = longer.step(step, 2)
        assert sum(len(own) for own in found.packs) == PACKS.size
        assert found.pack_length in LENGTHS
        assert len(samples_of(found)) > 2 * len(samples_of(plan.step(step, 2)))


def test_a_short_step_has_short_packs(make_plan: MakePlan) -> None:
    few = BatchConfig(size=4)
    longer = with_packs(make_plan(few), (LENGTH, 2 * LENGTH, 3 * LENGTH, 9 * LENGTH), few)
    assert {longer.step(step, 4).pack_length for step in range(10)} == {LENGTH}
    assert longer.step(0, 1).pack_length > LENGTH


def test_the_fingerprint_knows_the_pack_length_only_where_it_differs(make_plan: MakePlan) -> None:
    """Checkpoints of before have the fingerprint of a plan without one."""
    plan = make_plan(SAMPLES)
    same = with_packs(plan, (LENGTH,), SAMPLES)
    assert same.fingerprint == plan.fingerprint
    assert same.first_fingerprint == plan.first_fingerprint
    assert same.step(3, 2) == plan.step(3, 2)
    prints = {with_packs(plan, (LENGTH, each), SAMPLES).fingerprint for each in LENGTHS[1:]}
    assert len(prints | {plan.fingerprint}) == 3
    # How many lengths there are follows from the layout, which may change.
    assert (
        with_packs(plan, (LENGTH, 999), SAMPLES).fingerprint
        == with_packs(plan, (LENGTH, 2 * LENGTH, 999), SAMPLES).fingerprint
    )


# ---- balance ----

MIX: dict[str, tuple[int, int, AttentionCost]] = {
    "d": (3200, 8192, AttentionCost(28)),
    "x": (1024, 4096, AttentionCost(28, 2 * 7 * 256)),
    "h": (1280, 4096, AttentionCost(28, 2 * 7 * 256, tiles_in_decoder=1)),
}
"""Sample and pack lengths of the recipes of 8B."""
IN_DECODER = {"d": 256, "x": 0, "h": 60}
"""Tokens in the decoder for each tile; of H's only the thumbnail's, on average."""


@pytest.fixture
def mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], DataPlan]:
    def make(name: str, size: int) -> DataPlan:
        length, longest, attention = MIX[name]
        monkeypatch.setattr(made_sources, "TILE_TOKENS", IN_DECODER[name])
        blend = make_blend(tmp_path, length, num_shards=4, rows=1000)
        sources = open_sources(blend, Store(str(tmp_path)), cast(SampleEncoder, NoEncoder()))
        packing = Packing(geometry.pack_lengths(stage(length, longest)), attention)
        return DataPlan(sources, BatchConfig(size), length, 1, 0.0, None, packing)

    return make


def measures(plan: DataPlan) -> dict[str, Callable[[PackPlan], int]]:
    return {
        "tokens": lambda pack: pack.num_tokens,
        "tiles": lambda pack: pack.num_tiles,
        "attention": plan.packing.attention.of_pack,
    }


def mean_imbalance(steps: Sequence[StepPlan], load: Callable[[PackPlan], int]) -> float:
    """Of ranks: busiest over mean."""
    return statistics.fmean(imbalance(rank_loads(step, load)) for step in steps)


def mean_of_packs(steps: Sequence[StepPlan], load: Callable[[PackPlan], int]) -> float:
    """Of packs: largest over mean."""
    found = [[load(pack) for own in step.packs for pack in own] for step in steps]
    return statistics.fmean(imbalance(each) for each in found)


@pytest.mark.parametrize("name", MIX)
def test_ranks_and_packs_are_alike(mix: Callable[[str, int], DataPlan], name: str) -> None:
    """Tokens, tiles and attention; packs of best fit in their order are what they must be better than."""
    plan = mix(name, 256)
    steps = [plan.step(step, 4) for step in range(5)]
    bad = [as_best_fit_makes_them(plan, step, 4) for step in range(5)]
    for what, load in measures(plan).items():
        assert mean_imbalance(steps, load) < 1.06, what
        assert mean_imbalance(bad, load) > (1.06 if what != "tokens" else 1.0), what
        assert mean_of_packs(steps, load) < 1.25, what
    assert mean_of_packs(bad, plan.packing.attention.of_pack) > 1.25
    used = statistics.fmean(
        sum(rank_loads(step, lambda pack: pack.num_tokens))
        / (step.pack_length * sum(len(own) for own in step.packs))
        for step in steps
    )
    assert used > 0.87


def as_best_fit_makes_them(plan: DataPlan, step: int, dp_size: int) -> StepPlan:
    """A bad deal: packs as best fit makes them, from long samples to short ones, the first ones to rank 0."""
    draws = plan.draws(step * plan.batch.size, (step + 1) * plan.batch.size)
    groups = best_fit_decreasing([s.num_tokens for s in draws], plan.packing.most_tokens)
    packs = [PackPlan(tuple(draws[i] for i in group)) for group in groups]
    share = -(-len(packs) // dp_size)
    dealt = [tuple(packs[first : first + share]) for first in range(0, share * dp_size, share)]
    return StepPlan(step, tuple(dealt), plan.packing.most_tokens)


def test_attention_is_dealt_evenly_among_packs_of_equal_tiles(
    mix: Callable[[str, int], DataPlan],
) -> None:
    """What `deal` alone does: without attention's cost it would not look at it."""
    plan = mix("d", 256)
    draws = plan.draws(0, 256)
    groups = best_fit_decreasing([s.num_tokens for s in draws], 4096)
    packs = [PackPlan(tuple(draws[i] for i in group)) for group in groups]
    load = plan.packing.attention.of_pack
    blind = deal(packs, 4, AttentionCost(per_pair=0))
    seeing = deal(packs, 4, plan.packing.attention)
    worst = [imbalance(rank_loads(StepPlan(0, dealt, 4096), load)) for dealt in (blind, seeing)]
    assert worst[1] < 1.05 < worst[0]
