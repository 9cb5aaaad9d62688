"""Shards opened later: the right ones, few at a time, and none that changed meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nvlm_train.data.index.lengths import ShardLengths, compute_lengths
from nvlm_train.data.index.reader import ShardReader
from nvlm_train.data.plan.data_recipe import Blend, SourceConfig
from nvlm_train.data.plan.sources import Source, open_sources
from nvlm_train.data.samples.encoder import SampleEncoder
from nvlm_train.data.shards.store import Store
from nvlm_train.data.shards.tar import write_shards
from nvlm_train.errors import ShardError
from tests.data.conftest import mixed_samples

MakeEncoder = Callable[..., SampleEncoder]


@pytest.fixture
def source(tmp_path: Path, make_encoder: MakeEncoder) -> Source:
    """Three shards of four samples."""
    write_shards(mixed_samples(12, "k"), str(tmp_path / "s-%06d.tar"), 4)
    names = tuple(f"s-{number:06d}.tar" for number in range(3))
    blend = Blend("b", (SourceConfig("s", names),))
    return open_sources(blend, Store(str(tmp_path)), make_encoder())[0]


def test_shards_are_a_sequence(source: Source) -> None:
    assert [reader.key(0) for reader in source.readers] == ["k0000", "k0004", "k0008"]
    assert [reader.name for reader in source.readers[1:]] == ["s-000001.tar", "s-000002.tar"]
    assert source.readers[-1] is source.readers[2]
    assert sum(len(lengths.num_tokens) for lengths in source.lengths) == source.num_samples == 12
    with pytest.raises(IndexError, match="shard=3 of 3"):
        source.readers[3]


def test_arrays_are_views_that_nobody_can_write(source: Source) -> None:
    for array in (source.lengths[0].num_tokens, source.readers[0].index.records):
        assert array.base is not None and not array.flags.writeable


def test_a_shard_that_was_indexed_anew_meanwhile(
    tmp_path: Path, source: Source, make_encoder: MakeEncoder
) -> None:
    write_shards(mixed_samples(12, "other"), str(tmp_path / "s-%06d.tar"), 4)
    blend = Blend("b", (SourceConfig("s", ("s-000001.tar",)),))
    open_sources(blend, Store(str(tmp_path)), make_encoder())  # another process indexes it
    with pytest.raises(ShardError, match=r"changed shard=.*s-000001.tar: digest=.*, the run began"):
        source.readers[1].key(0)


def test_what_cannot_be_written_is_made_once(
    tmp_path: Path, source: Source, make_encoder: MakeEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Indexes and lengths that a blend cannot store are the stored ones, and kept in memory."""
    (tmp_path / "full").write_text("no directory can be made below a file")
    read: list[str] = []

    def counted(reader: ShardReader, encoder: SampleEncoder) -> ShardLengths:
        read.append(reader.name)
        return compute_lengths(reader, encoder)

    monkeypatch.setattr("nvlm_train.data.index.lengths.compute_lengths", counted)
    names = tuple(f"s-{number:06d}.tar" for number in range(3))
    blend = Blend("b", (SourceConfig("s", names),))
    unstored = str(tmp_path / "full/index")
    (kept,) = open_sources(blend, Store(str(tmp_path)), make_encoder(), unstored)
    assert kept.table.lengths_digest == source.table.lengths_digest
    assert np.array_equal(kept.table.digests, source.table.digests)
    for number in (2, 0, 1):
        assert kept.readers[number].sample(3) == source.readers[number].sample(3)
        assert np.array_equal(kept.lengths[number].num_tokens, source.lengths[number].num_tokens)
        assert kept.lengths[number].reasons == source.lengths[number].reasons
    assert read == list(names)
