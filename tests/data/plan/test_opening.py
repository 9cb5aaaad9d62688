"""Shards opened later: the right ones, few at a time, and none that changed meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

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
