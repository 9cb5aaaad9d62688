"""Blends whose sources leave, weights by trained tokens, and the exactness of every draw."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvlm_train.batch import RankShare
from nvlm_train.config.schema import BatchConfig, LoaderConfig
from nvlm_train.data.loading.loader import Loader
from nvlm_train.data.plan.blend import BlendOrder, split_draws
from nvlm_train.data.plan.data_recipe import Blend, SourceConfig, read_blend
from nvlm_train.data.plan.plan import DataPlan
from nvlm_train.data.plan.sources import open_sources
from nvlm_train.data.samples.encoder import SampleEncoder
from nvlm_train.data.shards.store import Store
from nvlm_train.data.shards.tar import write_shards
from nvlm_train.errors import ConfigError, TrainingError
from tests.data.conftest import LENGTH, chat

MakeEncoder = Callable[..., SampleEncoder]
UNITS = st.lists(st.integers(1, 10_000), min_size=1, max_size=20)


@settings(max_examples=100, deadline=None)
@given(UNITS, st.integers(0, 10**12))
def test_one_draw_more_adds_one_to_one_source(units: list[int], draws: int) -> None:
    before, after = split_draws(draws, units), split_draws(draws + 1, units)
    steps = [last - first for first, last in zip(before, after, strict=True)]
    assert sorted(steps) == [0] * (len(units) - 1) + [1]
    assert sum(before) == draws
    exact = [draws * unit / sum(units) for unit in units]
    assert max(abs(a - b) for a, b in zip(before, exact, strict=True)) < 3


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0.01, 10), st.none() | st.integers(1, 4000)), min_size=1, max_size=6
    ),
    st.integers(0, 99),
)
def test_limited_sources_give_exactly_their_limit(
    sources: list[tuple[float, int | None]], seed: int
) -> None:
    weights, limits = [weight for weight, _ in sources], [limit for _, limit in sources]
    blend = BlendOrder(weights, seed, limits)
    total = blend.num_draws
    assert (total is None) == (None in limits)
    if total is not None:
        assert total == sum(limit for limit in limits if limit is not None)
    found, numbers = blend.draws(0, 6000 if total is None else total + 5000)
    assert total is None or len(found) == total
    for source, limit in enumerate(limits):
        own = numbers[found == source]
        assert np.array_equal(own, np.arange(len(own)))
        assert limit is None or len(own) <= limit
    present = blend.drawn_before(3000)
    assert all(limit is None or n <= limit for n, limit in zip(present, limits, strict=True))
    again, _ = BlendOrder(weights, seed, limits).draws(2500, 3500)
    assert np.array_equal(again, found[2500:3500])


def test_others_keep_their_proportions() -> None:
    blend = BlendOrder([0.5, 0.2, 0.3], 1, [1000, None, None])
    found, _ = blend.draws(0, 22_000)
    late = np.bincount(found[2000:], minlength=3)
    assert (found == 0).sum() == 1000 and late[0] <= 3
    assert abs(late[1] - 8000) < 10 and abs(late[2] - 12_000) < 10


def test_far_draws_cost_no_more_than_near_ones() -> None:
    blend = BlendOrder([1.0] * 40, 1, [10**9, *[None] * 39])
    assert blend.draws(10**11, 10**11 + 10)[0].shape == (10,)
    assert len(blend._phases) == 2  # nothing else grows with the draw


def plan_of(
    root: Path, encoder: SampleEncoder, sources: tuple[SourceConfig, ...], batch: BatchConfig
) -> DataPlan:
    blend = Blend("b", sources, "samples")
    return DataPlan(open_sources(blend, Store(str(root)), encoder), batch, LENGTH, 3, 0.0)


def test_epochs_and_max_samples(data_root: Path, make_encoder: MakeEncoder) -> None:
    a = tuple(f"a-{n:06d}.tar" for n in range(5))
    b = ("b-000000.tar", "b-000001.tar")
    sources = (SourceConfig("a", a, epochs=2), SourceConfig("b", b, 3.0, max_samples=25))
    plan = plan_of(data_root, make_encoder(), sources, BatchConfig(16))
    drawn = plan.draws(0, 1000)
    counts = Counter((s.source, s.shard, s.row) for s in drawn)
    assert len(drawn) == 2 * 57 + 25
    assert {n for place, n in counts.items() if place[0] == 0} == {2}
    assert sum(n for place, n in counts.items() if place[0] == 1) == 25
    assert plan.step(7, 2).step == 7
    with pytest.raises(TrainingError, match=r"step=8 is more than .* after 139 samples \(a 114, b"):
        plan.step(8, 2)
    plan.check_steps(8)
    with pytest.raises(TrainingError, match="steps=9 is more than the blend gives"):
        plan.check_steps(9)


def test_limited_packs_end(data_root: Path, make_encoder: MakeEncoder) -> None:
    sources = (SourceConfig("b", ("b-000000.tar",), epochs=3),)
    plan = plan_of(data_root, make_encoder(), sources, BatchConfig(2, "packs", window=10))
    assert plan.num_windows == 3
    drawn: Counter[int] = Counter()
    for step in range(100):
        try:
            packs = plan.step(step, 1).packs[0]
        except TrainingError as error:
            assert "epochs and max_samples of the data recipe" in str(error)
            break
        drawn.update(sample.row for pack in packs for sample in pack.samples)
    assert 20 <= sum(drawn.values()) <= 27 and max(drawn.values()) <= 3


@pytest.mark.parametrize("prefetch", [1, 2, 9])
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("unit", ["samples", "packs"])
def test_the_last_possible_step_is_loaded(
    data_root: Path, make_encoder: MakeEncoder, unit: str, workers: int, prefetch: int
) -> None:
    """Whatever is made ahead: the stage asks for no more than the blend gives, and gets all of it."""
    encoder = make_encoder()
    sources = (SourceConfig("b", ("b-000000.tar",), epochs=3),)
    batch = BatchConfig(4, unit, window=10)  # type: ignore[arg-type]
    plan = plan_of(data_root, encoder, sources, batch)
    possible = next(n for n in range(1, 100) if not is_possible(plan, n + 1))
    config = LoaderConfig(workers=workers, prefetch_steps=prefetch)
    for start in (0, possible - 1):
        with Loader(plan, encoder, RankShare(), config, 20, range(start, possible)) as loader:
            assert [each.step for each in loader] == list(range(start, possible))
            assert list(loader) == []


def is_possible(plan: DataPlan, steps: int) -> bool:
    """Whether a stage of so many steps is accepted. What is accepted can be planned to its end."""
    try:
        plan.check_steps(steps)
    except TrainingError as error:
        assert f"steps={steps} is more than the blend gives" in str(error)
        with pytest.raises(TrainingError):
            plan.step(steps - 1, 1)
        return False
    assert plan.step(steps - 1, 1).step == steps - 1
    return True


def test_weights_by_trained_tokens(tmp_path: Path, make_encoder: MakeEncoder) -> None:
    for name, words in (("short", 1), ("long", 12)):
        samples = [(f"{name}{n}", chat("what?", "cat " * words), []) for n in range(40)]
        write_shards(samples, str(tmp_path / f"{name}-%06d.tar"))
    sources = tuple(
        SourceConfig(n, (f"{n}-000000.tar",), w) for n, w in (("short", 1), ("long", 3))
    )
    encoder = make_encoder()
    opened = open_sources(Blend("b", sources, "trained_tokens"), Store(str(tmp_path)), encoder)
    plan = DataPlan(opened, BatchConfig(8), LENGTH, 3, 0.0)
    tokens = [0, 0]
    for sample in plan.draws(0, 10_000):
        lengths = plan.sources[sample.source].lengths[sample.shard]
        tokens[sample.source] += int(lengths.num_trained[sample.row])
    assert abs(tokens[1] / sum(tokens) - 0.75) < 0.01


def test_limits_in_a_data_recipe(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(
        "weight_by: trained_tokens\nsources:\n- {name: a, shards: a.tar, epochs: 1.5, max_samples: 9}\n"
    )
    blend = read_blend(str(path), ".")
    assert blend.weight_by == "trained_tokens"
    assert blend.sources == (SourceConfig("a", ("a.tar",), 1.0, 1.5, 9),)
    path.write_text(
        "weight_by: bytes\nsources:\n- {name: a, shards: a.tar, epochs: 0, max_samples: 2.5}\n"
    )
    with pytest.raises(ConfigError) as caught:
        read_blend(str(path), ".")
    assert [problem.split(": ", 1)[1] for problem in caught.value.problems] == [
        "sources[0].epochs=0 must be a positive number, or left out",
        "sources[0].max_samples=2.5 must be a whole number above 0",
        "weight_by='bytes' must be one of samples, trained_tokens",
    ]


@pytest.mark.parametrize("stated", ["2", "old"])
def test_a_data_recipe_of_another_format_is_refused(tmp_path: Path, stated: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("format: 1\nsources: [{name: a, shards: a.tar}]\n")
    assert [source.name for source in read_blend(str(path), ".").sources] == ["a"]
    path.write_text(f"format: {stated}\nsuorces: [{{name: a, shards: a.tar}}]\n")
    with pytest.raises(
        ConfigError, match="reads data recipes of format 1; use the nvlm-train that"
    ):
        read_blend(str(path), ".")


@pytest.mark.parametrize("number", ["1" + 400 * "0", ".inf", ".nan", "-1", "true"])
def test_weights_and_epochs_are_finite(tmp_path: Path, number: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(f"sources: [{{name: a, shards: a.tar, weight: {number}, epochs: {number}}}]\n")
    with pytest.raises(ConfigError) as caught:
        read_blend(str(path), ".")
    assert len(caught.value.problems) == 2
