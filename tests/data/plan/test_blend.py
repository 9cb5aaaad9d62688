"""Data recipes, shares of the sources, and epochs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nvlm_train.data.plan.blend import BLOCK, SHARD_WINDOW, BlendOrder, SourceOrder
from nvlm_train.data.plan.data_recipe import SourceConfig, read_blend
from nvlm_train.errors import ConfigError

WEIGHTS = st.lists(st.floats(0.0001, 100), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None)
@given(WEIGHTS, st.integers(0, 2**31))
def test_shares_within_one_percent_over_ten_thousand_draws(weights: list[float], seed: int) -> None:
    sources, _ = BlendOrder(weights, seed).draws(0, 10_000)
    shares = np.bincount(sources, minlength=len(weights)) / 10_000
    assert np.abs(shares - np.array(weights) / sum(weights)).max() < 0.01


@settings(max_examples=40, deadline=None)
@given(WEIGHTS, st.integers(0, 5000), st.integers(1, 3000))
def test_any_range_is_part_of_the_same_sequence(
    weights: list[float], start: int, count: int
) -> None:
    whole = BlendOrder(weights, 3).draws(0, start + count)
    part = BlendOrder(weights, 3).draws(start, start + count)
    for all_of_it, piece in zip(whole, part, strict=True):
        assert np.array_equal(all_of_it[start:], piece)


@settings(max_examples=20, deadline=None)
@given(WEIGHTS)
def test_a_sources_draws_are_numbered_without_gaps(weights: list[float]) -> None:
    sources, numbers = BlendOrder(weights, 1).draws(0, 3 * BLOCK)
    for source in range(len(weights)):
        assert np.array_equal(numbers[sources == source], np.arange((sources == source).sum()))


def test_small_weights_are_neither_lost_nor_rounded_up() -> None:
    sources, _ = BlendOrder([0.0001, 0.3, 0.6999], 0).draws(0, 200_000)
    assert abs(int((sources == 0).sum()) - 20) <= 1


def ordered(usable: list[NDArray[np.int64]], *salt: str | int) -> SourceOrder:
    counts = np.array([len(rows) for rows in usable], dtype=np.int64)
    return SourceOrder(counts, usable.__getitem__, *salt)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=25), st.integers(0, 99))
def test_every_usable_sample_once_per_epoch(sizes: list[int], seed: int) -> None:
    usable = [np.arange(size, dtype=np.int64) * 2 for size in sizes]
    order = ordered(usable, seed, "name")
    everything = {(s, int(row)) for s, rows in enumerate(usable) for row in rows}
    total = len(everything)
    if total == 0:
        return
    for epoch in range(2):
        shards, rows = order.locate(epoch * total, (epoch + 1) * total)
        seen = Counter(zip(shards.tolist(), rows.tolist(), strict=True))
        assert set(seen) == everything and set(seen.values()) == {1}


def test_epochs_differ_and_ranges_agree() -> None:
    order = ordered([np.arange(10, dtype=np.int64) for _ in range(20)], 1, "x")
    first, second = order.locate(0, 200), order.locate(200, 400)
    assert not np.array_equal(first, second)
    again = ordered([np.arange(10, dtype=np.int64) for _ in range(20)], 1, "x")
    crossing = again.locate(150, 250)
    joined = np.concatenate([np.array(first), np.array(second)], axis=1)[:, 150:250]
    assert np.array_equal(np.array(crossing), joined)


def test_reads_stay_inside_a_window_of_shards() -> None:
    order = ordered([np.arange(10, dtype=np.int64) for _ in range(20)], 1, "x")
    shards, _ = order.locate(0, SHARD_WINDOW * 10)
    assert len(set(shards.tolist())) == SHARD_WINDOW


def write(tmp_path: Path, text: str) -> str:
    (tmp_path / "sft.yaml").write_text(text)
    return str(tmp_path)


def test_data_recipe(tmp_path: Path) -> None:
    directory = write(
        tmp_path,
        "sources:\n- {name: vqa, shards: 'v-{0..1}.tar', weight: 3}\n"
        "- {name: text, shards: [t.tar, u.tar]}\n",
    )
    blend = read_blend("sft", directory)
    assert blend.name == "sft"
    assert blend.sources == (
        SourceConfig("vqa", ("v-0.tar", "v-1.tar"), 3.0),
        SourceConfig("text", ("t.tar", "u.tar"), 1.0),
    )
    assert read_blend(str(tmp_path / "sft.yaml"), "elsewhere") == blend


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "sources: [{name: a, shards: a.tar, wieght: 1}]",
            "sources[0]: unknown key 'wieght'; did you mean 'weight'?; known: name, shards, weight",
        ),
        (
            "sources: [{name: a, shards: a.tar}]\nsource: 1",
            "unknown key 'source'; did you mean 'sources'?; known: sources",
        ),
        ("sources: []", "sources is empty; name at least one"),
        ("- a", "must have a list `sources:` of name, shards, weight"),
        (
            "sources: [{name: a, shards: a.tar, weight: 0}]",
            "sources[0].weight=0 must be a positive number; leave unused sources out",
        ),
        ("sources: [{shards: a.tar}]", "sources[0].name=None must be text"),
        ("sources: [{name: a}]", "sources[0].shards=None must be a pattern like"),
        ("sources: [{name: a, shards: 'a{0..}{.tar'}]", "balance the braces"),
        ("sources: [{name: a, shards: [a.tar, a.tar]}]", "sources[0].shards names a.tar twice"),
        ("sources: [{name: a, shards: a}, {name: a, shards: b}]", "sources[1].name=a occurs twice"),
        ("sources: [", "is not YAML"),
    ],
)
def test_bad_data_recipes(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_blend("sft", write(tmp_path, text))
    assert message in str(caught.value) and "sft.yaml" in str(caught.value)


def test_missing_data_recipe(tmp_path: Path) -> None:
    write(tmp_path, "sources: []")
    with pytest.raises(
        ConfigError, match=r"blend=stf: .*stf.yaml does not exist; did you mean 'sft'"
    ):
        read_blend("stf", str(tmp_path))
