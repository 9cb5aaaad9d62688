"""Plans: same samples at any data-parallel size, packs that fit, ranks that are balanced."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvlm_train.batch import PackPlan, SampleRef, StepPlan
from nvlm_train.config.schema import BatchConfig
from nvlm_train.data.plan.data_recipe import Blend, SourceConfig
from nvlm_train.data.plan.packing import best_fit_decreasing, deal
from nvlm_train.data.plan.plan import PLAN_DIGEST, DataPlan
from nvlm_train.data.plan.sources import open_sources
from nvlm_train.data.samples.encoder import SampleEncoder
from nvlm_train.data.shards.store import Store
from nvlm_train.data.shards.tar import write_shards
from nvlm_train.errors import ShardError, TrainingError
from tests.data.conftest import LENGTH, chat, mixed_samples

SAMPLES = BatchConfig(size=16)
PACKS = BatchConfig(size=6, unit="packs", window=32)
MakePlan = Callable[..., DataPlan]
MakeEncoder = Callable[..., SampleEncoder]


def samples_of(plan: StepPlan) -> list[SampleRef]:
    return [sample for packs in plan.packs for pack in packs for sample in pack.samples]


def identity(samples: list[SampleRef]) -> Counter[tuple[int, int, int]]:
    return Counter((sample.source, sample.shard, sample.row) for sample in samples)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 100), max_size=60))
def test_best_fit_never_overfills_and_loses_nothing(lengths: list[int]) -> None:
    groups = best_fit_decreasing(lengths, 100)
    assert all(sum(lengths[i] for i in group) <= 100 for group in groups)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    # Any two groups could not have been one.
    fills = sorted(sum(lengths[i] for i in group) for group in groups)
    assert len(fills) < 2 or fills[0] + fills[1] > 100


def test_a_sample_longer_than_the_pack() -> None:
    with pytest.raises(ValueError, match="sample of 101 tokens does not fit a pack of 100"):
        best_fit_decreasing([5, 101], 100)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 20), max_size=40), st.integers(1, 9))
def test_deal_is_even(tiles: list[int], num_ranks: int) -> None:
    packs = [PackPlan((SampleRef(0, 0, i, 10, count),)) for i, count in enumerate(tiles)]
    dealt = deal(packs, num_ranks)
    assert Counter(p for own in dealt for p in own if p.samples) == Counter(packs)
    counts = [sum(bool(pack.samples) for pack in own) for own in dealt]
    assert max(counts) - min(counts) <= 1 and all(dealt)
    loads = [sum(pack.num_tiles for pack in own) for own in dealt]
    assert len(packs) < num_ranks or max(loads) - min(loads) <= 2 * max(tiles)


@pytest.mark.parametrize("batch", [SAMPLES, PACKS], ids=["samples", "packs"])
def test_same_samples_at_any_data_parallel_size(make_plan: MakePlan, batch: BatchConfig) -> None:
    plan = make_plan(batch)
    for step in (0, 3, 17):
        expected = identity(samples_of(plan.step(step, 1)))
        for dp_size in (2, 3, 4, 8):
            dealt = plan.step(step, dp_size)
            assert len(dealt.packs) == dp_size
            assert identity(samples_of(dealt)) == expected


@pytest.mark.parametrize("batch", [SAMPLES, PACKS], ids=["samples", "packs"])
def test_packs_never_exceed_the_length(make_plan: MakePlan, batch: BatchConfig) -> None:
    plan = make_plan(batch)
    for step in range(20):
        for packs in plan.step(step, 2).packs:
            assert all(pack.num_tokens <= LENGTH for pack in packs)


@pytest.mark.parametrize("batch", [SAMPLES, PACKS], ids=["samples", "packs"])
def test_any_step_is_found_without_those_before(make_plan: MakePlan, batch: BatchConfig) -> None:
    plan = make_plan(batch)
    forwards = [plan.step(step, 2) for step in range(25)]
    assert make_plan(batch).step(24, 2) == forwards[24]
    assert plan.step(3, 2) == forwards[3]
    assert make_plan(batch, seed=8).step(3, 2) != forwards[3]


def test_sizes_of_steps(make_plan: MakePlan) -> None:
    assert len(samples_of(make_plan(SAMPLES).step(5, 3))) == 16
    plan = make_plan(PACKS)
    assert sum(len(packs) for packs in plan.step(5, 3).packs) == 6


@pytest.mark.parametrize("batch", [SAMPLES, PACKS], ids=["samples", "packs"])
def test_steps_follow_the_draws(make_plan: MakePlan, batch: BatchConfig) -> None:
    plan = make_plan(batch)
    drawn = [sample for step in range(30) for sample in samples_of(plan.step(step, 1))]
    unit = 16 if batch is SAMPLES else 32
    whole = len(drawn) // unit * unit
    if batch is SAMPLES:
        assert identity(drawn) == identity(plan.draws(0, whole))
    else:
        # A window's packs may still be under way at the end.
        surplus = identity(drawn) - identity(plan.draws(0, whole + unit))
        assert not surplus


def test_each_sample_once_per_epoch_of_its_source(make_plan: MakePlan) -> None:
    plan = make_plan(SAMPLES)
    drawn = [sample for sample in plan.draws(0, 1000) if sample.source == 0]
    for epoch in range(len(drawn) // 57):
        part = identity(drawn[epoch * 57 : (epoch + 1) * 57])
        assert len(part) == 57 and set(part.values()) == {1}
    assert abs(len(drawn) - 700) <= 1


def test_empty_packs_only_when_there_are_too_few(make_plan: MakePlan) -> None:
    packs = make_plan(BatchConfig(size=1)).step(0, 4).packs
    assert [len(own) for own in packs] == [1, 1, 1, 1]
    assert sum(bool(own[0].samples) for own in packs) == 1


def test_recorded_digests(make_plan: MakePlan) -> None:
    plan = make_plan(SAMPLES)
    recorded = plan.digests
    plan.check_digests(recorded)
    changed = recorded | {"a-000002.tar": "0" * 64}
    message = (
        "changed shard=a-000002.tar: digest=.*, the run began with 000000000000; restore the shard"
    )
    with pytest.raises(ShardError, match=message):
        plan.check_digests(changed)
    with pytest.raises(ShardError, match="seed, batch, weights, order of the sources or encoding"):
        make_plan(SAMPLES, seed=8).check_digests(recorded)
    with pytest.raises(ShardError, match=r"shard=z.tar was in the blend when the run began"):
        plan.check_digests(recorded | {"z.tar": ""})
    with pytest.raises(ShardError, match=r"shard=a-000000.tar was not in the blend"):
        plan.check_digests({name: recorded[name] for name in list(recorded)[1:]})


def test_other_tokens_of_equal_number_are_refused(
    make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`<tile_2>` and the thumbnail's tag are five tokens each of Qwen2's: lengths say nothing."""
    before = make_plan(SAMPLES)
    monkeypatch.setattr("nvlm_train.data.samples.encoder.ENCODING_VERSION", 0)
    now = make_plan(SAMPLES)
    assert list(map(samples_of, [now.step(0, 1)])) == list(map(samples_of, [before.step(0, 1)]))
    with pytest.raises(ShardError, match="or encoding .tokenizer, tiling, prompts, nvlm-train's"):
        now.check_digests(before.digests)


def test_digests_of_the_first_format_are_compared_as_they_were(make_plan: MakePlan) -> None:
    """Lengths stand for the encoding there, and nothing else does."""
    plan = make_plan(SAMPLES)
    recorded = plan.digests | {PLAN_DIGEST: plan.first_fingerprint}
    plan.check_digests(recorded)
    with pytest.raises(ShardError, match="seed, batch, weights"):
        make_plan(replace(SAMPLES, size=SAMPLES.size + 1)).check_digests(recorded)


def test_a_limit_that_leaves_nothing_out_may_change(make_encoder: MakeEncoder) -> None:
    one, other = make_encoder(), make_encoder(max_image_pixels=2_000_000)
    assert one.tokens_fingerprint == other.tokens_fingerprint
    assert one.fingerprint != other.fingerprint, "stored lengths depend on it"


def test_fingerprint_sees_seed_batch_and_weights(make_plan: MakePlan) -> None:
    plan = make_plan(SAMPLES)
    heavier = [replace(plan.sources[0], weight=0.9), plan.sources[1]]
    others = [
        make_plan(SAMPLES, seed=8),
        make_plan(PACKS),
        DataPlan(heavier, SAMPLES, LENGTH, 7, 0.0),
    ]
    assert make_plan(SAMPLES).fingerprint == plan.fingerprint
    assert len({plan.fingerprint, *(other.fingerprint for other in others)}) == 4


def broken_plan(tmp_path: Path, encoder: SampleEncoder, limit: float) -> DataPlan:
    samples = mixed_samples(36, "k")
    samples += [(f"m{n}", chat("<image>", "a"), []) for n in range(3)]
    samples.append(("e", {"messages": [{"role": "user", "content": "hello"}]}, []))
    write_shards(samples, str(tmp_path / "s-%06d.tar"))
    blend = Blend("b", (SourceConfig("s", ("s-000000.tar",)),))
    return DataPlan(open_sources(blend, Store(str(tmp_path)), encoder), SAMPLES, LENGTH, 1, limit)


def test_unusable_samples_are_counted_and_never_drawn(
    tmp_path: Path, make_encoder: MakeEncoder
) -> None:
    plan = broken_plan(tmp_path, make_encoder(), 0.1)
    assert [(kind.kind, kind.count) for kind in plan.unusable] == [
        ("image marker without image", 3),
        ("every label is masked", 1),
    ]
    assert plan.unusable[1].examples == (
        "sample=e in shard=s-000000.tar: every label is masked: the conversation has no assistant turn",
    )
    drawn = identity(plan.draws(0, 72))
    assert len(drawn) == 36 and set(drawn.values()) == {2}


def test_too_many_unusable_samples(tmp_path: Path, make_encoder: MakeEncoder) -> None:
    with pytest.raises(TrainingError) as caught:
        broken_plan(tmp_path, make_encoder(), 0.05)
    message = str(caught.value)
    assert message.startswith(
        "10.00% of the samples drawn cannot be used, more than loader.max_skipped_fraction=0.05; "
    )
    assert "sample=e in shard=s-000000.tar: every label is masked: " in message


def test_source_without_usable_samples(tmp_path: Path, make_encoder: MakeEncoder) -> None:
    write_shards([("m", chat("<image>", "a"), [])], str(tmp_path / "s-%06d.tar"))
    blend = Blend("b", (SourceConfig("s", ("s-000000.tar",)),))
    sources = open_sources(blend, Store(str(tmp_path)), make_encoder())
    with pytest.raises(
        TrainingError, match="source=s has no usable sample, for example\n  sample=m"
    ):
        DataPlan(sources, SAMPLES, LENGTH, 1, 1.0)


def test_lengths_in_the_plan_are_the_encoders(
    make_plan: MakePlan, make_encoder: MakeEncoder
) -> None:
    plan, encoder = make_plan(SAMPLES), make_encoder()
    for sample in plan.draws(0, 30):
        reader = plan.reader(sample)
        encoded = encoder.encode(
            reader.key(sample.row),
            reader.record(sample.row),
            reader.index.image_sizes(sample.row),
        )
        assert (sample.num_tokens, sample.num_tiles) == (len(encoded.token_ids), encoded.num_tiles)
        assert np.all(encoded.label_positions < sample.num_tokens - 1)
