"""Packs of a realistic mix: how full, how even over ranks, and where a step's packs are found."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.made_sources import NoEncoder
from benchmarks.plan import make_blend
from nvlm_train.batch import StepPlan
from nvlm_train.config.schema import BatchConfig
from nvlm_train.data.index.files import open_arrays
from nvlm_train.data.plan.packing import best_fit_decreasing
from nvlm_train.data.plan.plan import DataPlan
from nvlm_train.data.plan.sources import open_sources
from nvlm_train.data.samples.encoder import SampleEncoder
from nvlm_train.data.shards.store import Store
from nvlm_train.errors import TrainingError
from tests.data.conftest import LENGTH

MakePlan = Callable[..., DataPlan]
PACKS = BatchConfig(6, "packs", 32)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 100), st.integers(0, 7)), max_size=60), st.integers(7, 20))
def test_both_budgets_hold(sizes: list[tuple[int, int]], max_tiles: int) -> None:
    tokens, tiles = [size[0] for size in sizes], [size[1] for size in sizes]
    groups = best_fit_decreasing(tokens, 100, tiles, max_tiles)
    assert all(sum(tokens[i] for i in group) <= 100 for group in groups)
    assert all(sum(tiles[i] for i in group) <= max_tiles for group in groups)
    assert sorted(i for group in groups for i in group) == list(range(len(sizes)))


def test_a_sample_of_more_tiles_than_a_pack(make_plan: MakePlan) -> None:
    with pytest.raises(ValueError, match="sample of 8 tiles does not fit a pack of 7 tiles"):
        best_fit_decreasing([5], 100, [8], 7)
    most = max(source.table.max_tiles for source in make_plan(PACKS).sources)
    with pytest.raises(TrainingError, match=rf"max_tiles_per_pack={most - 1}: source=. has a .*"):
        make_plan(replace(PACKS, max_tiles_per_pack=most - 1))
    plan = make_plan(replace(PACKS, max_tiles_per_pack=most))
    packs = [pack for step in range(10) for pack in plan.step(step, 1).packs[0]]
    assert max(pack.num_tiles for pack in packs) == most


def ratios(plan: StepPlan, what: str) -> tuple[float, float]:
    """(max / mean over ranks, the least that whole tiles or tokens allow)."""
    loads = [sum(getattr(pack, what) for pack in own) for own in plan.packs]
    mean = statistics.fmean(loads)
    return max(loads) / mean, math.ceil(mean) / mean


@pytest.mark.parametrize("sequence_length", [2048, 4096])
def test_full_and_even_on_a_realistic_mix(tmp_path: Path, sequence_length: int) -> None:
    blend = make_blend(tmp_path, sequence_length, num_shards=4, rows=1000)
    sources = open_sources(blend, Store(str(tmp_path)), cast(SampleEncoder, NoEncoder()))
    for size in (64, 128):
        plan = DataPlan(sources, BatchConfig(size, "packs"), sequence_length, 1, 0.0)
        used = []
        for step in range(12):
            for dp_size in (2, 4, 8):
                dealt = plan.step(step, dp_size)
                for what in ("num_tokens", "num_tiles"):
                    worst, possible = ratios(dealt, what)
                    assert worst <= max(1.05, possible)
            used += [pack.num_tokens / sequence_length for own in dealt.packs for pack in own]
        assert statistics.fmean(used) >= 0.97


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 400), st.sampled_from([1, 2, 3, 4, 8]))
def test_any_step_from_nothing_is_that_of_the_whole_stream(
    make_plan: MakePlan, step: int, dp_size: int
) -> None:
    plan = make_plan(PACKS)
    window = plan.packs_before.find(step * 6, None)
    assert window is not None
    stream = [pack for number in range(window + 3) for pack in plan._window(number)]
    expected = stream[step * 6 : (step + 1) * 6]
    found = make_plan(PACKS).step(step, dp_size)
    assert sorted(map(repr, expected)) == sorted(
        repr(pack) for own in found.packs for pack in own if pack.samples
    )


def with_table(plan: DataPlan, stem: Path) -> DataPlan:
    return DataPlan(plan.sources, plan.batch, LENGTH, plan.seed, 0.0, stem)


def test_table_on_disk(
    tmp_path: Path, make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = with_table(make_plan(PACKS), tmp_path / "mix")
    wanted = first.step(900, 2)
    (path,) = tmp_path.iterdir()
    assert path.name == f"mix.packs-{first.fingerprint[:16]}"
    stored = open_arrays(path).arrays["num_packs"]
    assert np.array_equal(stored, [first.count_packs(window) for window in range(len(stored))])
    counted: list[int] = []
    again = with_table(make_plan(PACKS), tmp_path / "mix")
    count = again.count_packs
    monkeypatch.setattr(
        again, "count_packs", lambda window: counted.append(window) or count(window)
    )
    assert again.step(900, 2) == wanted and counted == []
    # A damaged table and one of another plan are made anew.
    path.write_bytes(b"\0" * 100)
    assert with_table(make_plan(PACKS), tmp_path / "mix").step(900, 2) == wanted
    other = with_table(make_plan(PACKS, seed=8), tmp_path / "mix")
    assert other.step(900, 2) == make_plan(PACKS, seed=8).step(900, 2) != wanted
