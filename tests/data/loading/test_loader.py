"""Batches: the same for any number of workers, from any step, with every tile decoded once."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nvlm_train.batch import Microbatch, PackPlan, RankShare, SampleRef, StepBatch
from nvlm_train.config.schema import BatchConfig, LoaderConfig
from nvlm_train.data.images import cut_tiles, decode_image
from nvlm_train.data.loading.loader import Loader, group_rounds, split_tiles
from nvlm_train.data.plan.data_recipe import Blend, SourceConfig
from nvlm_train.data.plan.plan import DataPlan
from nvlm_train.data.plan.sources import open_sources
from nvlm_train.data.samples.encoder import SampleEncoder
from nvlm_train.data.shards.store import Store
from nvlm_train.data.shards.tar import write_shards
from nvlm_train.errors import ShardError
from tests.data.conftest import LENGTH, SLOTS, TILE, chat, draw_image, encoded, mixed_samples

BATCH = BatchConfig(size=12)
MakePlan = Callable[..., DataPlan]
MakeEncoder = Callable[..., SampleEncoder]
ALONE = RankShare()


def same(one: StepBatch, other: StepBatch) -> bool:
    """Bitwise, tensors included."""

    def flat(batch: StepBatch) -> list[object]:
        values: list[object] = [batch.step, batch.failures]
        for part in batch.rounds:
            values += [part.tile_split, part.pixels_TCEE]
            for pack in part.microbatches:
                values += [getattr(pack, name) for name in Microbatch.__dataclass_fields__]
        return values

    pairs = list(zip(flat(one), flat(other), strict=True))
    return all(a.equal(b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def batches(
    plan: DataPlan,
    encoder: SampleEncoder,
    count: int,
    share: RankShare = ALONE,
    workers: int = 0,
    start_step: int = 0,
    max_tiles: int = 20,
) -> list[StepBatch]:
    config = LoaderConfig(workers=workers)
    with Loader(
        plan, encoder, share, config, max_tiles, range(start_step, start_step + count)
    ) as loader:
        return [next(loader) for _ in range(count)]


@pytest.mark.parametrize("workers", [1, 4])
def test_same_for_any_number_of_workers(
    make_plan: MakePlan, make_encoder: MakeEncoder, workers: int
) -> None:
    plan, encoder = make_plan(BATCH), make_encoder()
    expected = batches(plan, encoder, 6)
    found = batches(plan, encoder, 6, workers=workers)
    assert all(same(*pair) for pair in zip(expected, found, strict=True))


@pytest.mark.parametrize("batch", [BATCH, BatchConfig(size=4, unit="packs", window=16)])
def test_resumes_at_any_step(
    make_plan: MakePlan, make_encoder: MakeEncoder, batch: BatchConfig
) -> None:
    encoder = make_encoder()
    whole = batches(make_plan(batch), encoder, 7)
    for start in range(7):
        rest = batches(make_plan(batch), encoder, 7 - start, workers=2, start_step=start)
        assert all(same(*pair) for pair in zip(whole[start:], rest, strict=True))


@pytest.mark.parametrize("replica_size", [2, 3, 8])
def test_shares_of_a_replica_cover_every_tile_once(
    make_plan: MakePlan, make_encoder: MakeEncoder, replica_size: int
) -> None:
    plan, encoder = make_plan(BATCH), make_encoder()
    whole = batches(plan, encoder, 3)
    ranks = [
        batches(plan, encoder, 3, RankShare(0, 1, rank, replica_size))
        for rank in range(replica_size)
    ]
    for step, expected in enumerate(whole):
        for number, part in enumerate(expected.rounds):
            own = [rank[step].rounds[number] for rank in ranks]
            assert own[0].tile_split == tuple(len(r.pixels_TCEE) for r in own)
            assert torch.cat([r.pixels_TCEE for r in own]).equal(part.pixels_TCEE)
            assert all(r.tile_split == own[0].tile_split for r in own)
            for pack, other in zip(part.microbatches, own[-1].microbatches, strict=True):
                assert pack.token_ids_S.equal(other.token_ids_S)


def test_data_parallel_ranks_cover_the_step(make_plan: MakePlan, make_encoder: MakeEncoder) -> None:
    plan, encoder = make_plan(BATCH), make_encoder()

    def keys(share: RankShare) -> list[str]:
        (batch,) = batches(plan, encoder, 1, share)
        return [s.key for r in batch.rounds for pack in r.microbatches for s in pack.samples]

    shares = [keys(RankShare(rank, 3)) for rank in range(3)]
    assert sorted(key for own in shares for key in own) == sorted(keys(ALONE))


def test_pixels_are_the_samples_tiles_in_order(
    make_plan: MakePlan, make_encoder: MakeEncoder
) -> None:
    plan, encoder = make_plan(BATCH), make_encoder()
    (batch,) = batches(plan, encoder, 1, max_tiles=1000)
    (packs,) = plan.step(0, 1).packs
    expected = []
    for sample in (sample for pack in packs for sample in pack.samples):
        reader = plan.reader(sample)
        sizes = reader.index.image_sizes(sample.row)
        text = encoder.encode(reader.key(sample.row), reader.record(sample.row), sizes)
        for number, grid in enumerate(text.grids):
            image = decode_image(reader.image(sample.row, number), 10**6)
            expected.append(cut_tiles(image, grid, text.tiles_per_image[number], TILE))
    assert batch.rounds[0].pixels_TCEE.equal(torch.cat(expected))
    for pack in batch.rounds[0].microbatches:
        assert len(pack.image_positions) == pack.num_tiles * SLOTS


def test_rounds_stay_under_their_bound(make_plan: MakePlan, make_encoder: MakeEncoder) -> None:
    plan, encoder = make_plan(BatchConfig(size=32)), make_encoder()
    (batch,) = batches(plan, encoder, 1, max_tiles=12)
    assert len(batch.rounds) > 1
    for part in batch.rounds:
        assert sum(part.tile_split) == sum(pack.num_tiles for pack in part.microbatches)
        assert sum(part.tile_split) <= 12 or len(part.microbatches) == 1


@given(st.lists(st.integers(0, 30), max_size=20), st.integers(1, 40))
def test_rounds_keep_order_and_lose_nothing(tiles: list[int], limit: int) -> None:
    packs = [PackPlan((SampleRef(0, 0, n, 1, count),)) for n, count in enumerate(tiles)]
    rounds = group_rounds(packs, limit)
    assert [pack for part in rounds for pack in part] == packs and all(rounds)
    assert all(sum(p.num_tiles for p in part) <= limit or len(part) == 1 for part in rounds)


@given(st.integers(0, 200), st.integers(1, 64))
def test_split_tiles(num_tiles: int, num_ranks: int) -> None:
    split = split_tiles(num_tiles, num_ranks)
    assert sum(split) == num_tiles and max(split) - min(split) <= 1 and len(split) == num_ranks


def small_plan(root: Path, encoder: SampleEncoder) -> DataPlan:
    blend = Blend("b", (SourceConfig("s", ("s-000000.tar",)),))
    sources = open_sources(blend, Store(str(root)), encoder)
    return DataPlan(sources, BatchConfig(size=4), LENGTH, 1, 0.0)


def test_a_truncated_image_is_a_counted_failure(tmp_path: Path, make_encoder: MakeEncoder) -> None:
    good = encoded(draw_image(96, 40), "JPEG", quality=95)
    samples = [(f"k{n}", chat("<image>", "a"), [("jpg", good)]) for n in range(3)]
    samples.append(("cut", chat("<image>", "a"), [("jpg", good[:-60])]))
    write_shards(samples, str(tmp_path / "s-%06d.tar"))
    encoder = make_encoder()
    plan = small_plan(tmp_path, encoder)
    for workers in (0, 2):
        (batch,) = batches(plan, encoder, 1, workers=workers, max_tiles=6)
        (failure,) = batch.failures
        part = batch.rounds[failure.round]
        pack = part.microbatches[failure.microbatch]
        assert pack.samples[failure.sample].key == "cut"
        assert failure.reason == "image cannot be read: Premature end of JPEG file"
        zero = [not tile.any() for part in batch.rounds for tile in part.pixels_TCEE]
        assert sum(zero) == 3 and len(zero) == 12


def test_split_image_fails_on_both_ranks(tmp_path: Path, make_encoder: MakeEncoder) -> None:
    data = encoded(draw_image(96, 40), "JPEG", quality=95)[:-60]
    write_shards([("cut", chat("<image>", "a"), [("jpg", data)])], str(tmp_path / "s-%06d.tar"))
    encoder = make_encoder()
    plan = small_plan(tmp_path, encoder)
    found = [batches(plan, encoder, 1, RankShare(0, 1, rank, 8))[0].failures for rank in (0, 1)]
    assert {(f.round, f.microbatch, f.sample) for f in found[0]} & {
        (f.round, f.microbatch, f.sample) for f in found[1]
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_changed_shard_stops_the_trainer(
    tmp_path: Path, make_encoder: MakeEncoder, workers: int
) -> None:
    write_shards(mixed_samples(8, "k"), str(tmp_path / "s-%06d.tar"))
    encoder = make_encoder()
    plan = small_plan(tmp_path, encoder)
    path = tmp_path / "s-000000.tar"
    content, status = path.read_bytes(), path.stat()
    path.write_bytes(content.replace(b"what", b"WHAT"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(
        ShardError, match=r"changed shard=.*s-000000.tar: sample=k000\d holds other"
    ):
        batches(plan, encoder, 3, workers=workers)


def test_close_is_clean_and_repeatable(make_plan: MakePlan, make_encoder: MakeEncoder) -> None:
    loader = Loader(
        make_plan(BATCH),
        make_encoder(),
        ALONE,
        LoaderConfig(workers=3, prefetch_steps=4),
        20,
        count(),
    )
    assert next(iter(loader)).step == 0
    loader.close()
    loader.close()


def test_all_text_step_has_no_pixels(tmp_path: Path, make_encoder: MakeEncoder) -> None:
    samples = [(f"k{n}", chat("q", "a"), []) for n in range(6)]
    write_shards(samples, str(tmp_path / "s-%06d.tar"))
    encoder = make_encoder()
    (batch,) = batches(small_plan(tmp_path, encoder), encoder, 1, RankShare(0, 1, 1, 4))
    assert batch.rounds[0].pixels_TCEE.shape == (0, 3, TILE, TILE)
    assert batch.rounds[0].tile_split == (0, 0, 0, 0)


def test_rank_without_samples_gets_an_empty_pack(tmp_path: Path, make_encoder: MakeEncoder) -> None:
    write_shards([("k", chat("q", "a"), [])], str(tmp_path / "s-%06d.tar"))
    encoder = make_encoder()
    (batch,) = batches(small_plan(tmp_path, encoder), encoder, 1, RankShare(7, 8))
    (pack,) = batch.rounds[0].microbatches
    assert pack.cu_seqlens.tolist() == [0, LENGTH] and len(pack.label_ids_L) == 0
