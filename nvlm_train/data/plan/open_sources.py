"""Opening a source: its shards' numbers at once, from file headers; the shards when they are read."""

from __future__ import annotations

import hashlib

import numpy as np

from nvlm_train.data.index.files import IndexFiles
from nvlm_train.data.index.lengths import (
    LengthsSummary,
    ShardLengths,
    load_lengths,
    read_lengths_summary,
    summarise,
)
from nvlm_train.data.index.reader import ShardReader
from nvlm_train.data.index.shard_index import (
    IndexSummary,
    ShardIndex,
    load_index,
    open_index,
    read_summary,
)
from nvlm_train.data.plan.data_recipe import Blend, SourceConfig, WeightBy
from nvlm_train.data.plan.shard_lists import missing_shard
from nvlm_train.data.plan.sources import OpenedLater, Recent, ShardTable, Source, recently_used
from nvlm_train.data.samples.encoder import SampleEncoder
from nvlm_train.data.shards.store import DIRECT, Store
from nvlm_train.data.shards.tar import join_root
from nvlm_train.errors import ShardError

_EXAMPLES = 3


def open_sources(
    blend: Blend,
    data_root: str,
    encoder: SampleEncoder,
    index_dir: str | None = None,
    store: Store = DIRECT,
) -> list[Source]:
    """Every source of the blend; shards without stored index and lengths are read first.

    Raises:
        ShardError: a shard that is missing or torn.
    """
    files, recent = IndexFiles(index_dir), recently_used()
    return [
        _open_source(
            _SourceShards(blend.name, source, data_root, encoder, files, store),
            blend.weight_by,
            recent,
        )
        for source in blend.sources
    ]


def _open_source(shards: _SourceShards, weight_by: WeightBy, recent: Recent) -> Source:
    table, config = shards.open_all(), shards.config
    num_usable = int(table.num_usable.sum())
    weight = config.weight
    if weight_by == "trained_tokens" and num_usable > 0:
        weight = config.weight / (table.num_trained / num_usable)
    count = len(table.names)
    return Source(
        name=config.name,
        weight=weight,
        table=table,
        readers=OpenedLater(count, shards.reader, recent),
        lengths=OpenedLater(count, shards.lengths, recent),
        max_draws=_max_draws(config, num_usable),
    )


def _max_draws(config: SourceConfig, num_usable: int) -> int | None:
    limits = [] if config.max_samples is None else [config.max_samples]
    if config.epochs is not None:
        limits.append(max(1, int(config.epochs * num_usable)))
    return min(limits, default=None)


class _SourceShards:
    """Opens the shards of one source.

    What could not be stored in a file (a read-only directory) is kept in memory instead.
    """

    def __init__(
        self,
        blend: str,
        config: SourceConfig,
        data_root: str,
        encoder: SampleEncoder,
        files: IndexFiles,
        store: Store,
    ) -> None:
        self.config = config
        self._blend = blend
        self._root = data_root
        self._encoder = encoder
        self._files = files
        self._store = store
        self._digests: list[str] = []
        self._kept_indexes: dict[int, ShardIndex] = {}
        self._kept_lengths: dict[int, ShardLengths] = {}

    def open_all(self) -> ShardTable:
        """Numbers of all shards. Raises ShardError."""
        num_samples: list[int] = []
        lengths: list[LengthsSummary] = []
        for number in range(len(self.config.shards)):
            index = self._index_summary(number)
            num_samples.append(index.num_samples)
            self._digests.append(index.digest)
            lengths.append(self._lengths_summary(number))
        encoding = self._encoder.tokens_fingerprint
        return _table(self.config.shards, num_samples, self._digests, lengths, encoding)

    def reader(self, number: int) -> ShardReader:
        """One shard, with its index mapped.

        Raises:
            ShardError: its index is not the one that was there at the start any more.
        """
        name = self.config.shards[number]
        shard = self._store.open(join_root(self._root, name))
        index = self._kept_indexes.get(number) or open_index(shard, self._files, self.config.fields)
        if index is None or index.digest != self._digests[number]:
            index = load_index(shard, self._files, self.config.fields)
        if index.digest != self._digests[number]:
            raise ShardError(
                f"changed shard={shard.path}: digest={index.digest[:12]}, the run began with "
                f"{self._digests[number][:12]}; restore the shard, or start a new run"
            )
        return ShardReader(name, shard, index, self.config.fields)

    def lengths(self, number: int) -> ShardLengths:
        """One shard's lengths, mapped."""
        kept = self._kept_lengths.get(number)
        return kept or load_lengths(self.reader(number), self._encoder, self._files)

    def _index_summary(self, number: int) -> IndexSummary:
        name = self.config.shards[number]
        path = join_root(self._root, name)
        shard = self._store.open(path)
        try:
            summary = read_summary(shard, self._files, self.config.fields)
            if summary is not None:
                return summary
            index = load_index(shard, self._files, self.config.fields)
            if read_summary(shard, self._files, self.config.fields) is None:
                self._kept_indexes[number] = index
            return IndexSummary(len(index), index.digest)
        except FileNotFoundError as error:
            raise missing_shard(self._blend, self.config, name, self._root) from error
        except OSError as error:
            raise ShardError(
                f"shard={path} cannot be read: {error}; blend={self._blend} "
                f"source={self.config.name} names it"
            ) from error

    def _lengths_summary(self, number: int) -> LengthsSummary:
        shard = self._store.open(join_root(self._root, self.config.shards[number]))
        stored = (shard, self._digests[number], self._encoder, self._files, self.config.fields)
        summary = read_lengths_summary(*stored)
        if summary is not None:
            return summary
        lengths = self.lengths(number)
        if read_lengths_summary(*stored) is None:
            self._kept_lengths[number] = lengths
        return summarise(lengths)


def _table(
    names: tuple[str, ...],
    num_samples: list[int],
    digests: list[str],
    lengths: list[LengthsSummary],
    encoding: str,
) -> ShardTable:
    unusable: dict[str, tuple[int, tuple[tuple[int, int], ...]]] = {}
    for shard, summary in enumerate(lengths):
        for kind, (count, rows) in summary.unusable.items():
            before, places = unusable.get(kind, (0, ()))
            places = (*places, *((shard, row) for row in rows))[:_EXAMPLES]
            unusable[kind] = (before + count, places)
    return ShardTable(
        names=names,
        num_samples=np.array(num_samples, dtype=np.int64),
        num_usable=np.array([summary.num_usable for summary in lengths], dtype=np.int64),
        digests=np.frombuffer(bytes.fromhex("".join(digests)), dtype=np.uint8).reshape(-1, 32),
        lengths_digest=hashlib.sha256("".join(s.digest for s in lengths).encode()).hexdigest(),
        encoding=encoding,
        num_truncated=sum(summary.num_truncated for summary in lengths),
        num_tokens=sum(summary.num_tokens for summary in lengths),
        num_trained=sum(summary.num_trained for summary in lengths),
        num_tiles=sum(summary.num_tiles for summary in lengths),
        max_tiles=max((summary.max_tiles for summary in lengths), default=0),
        unusable=unusable,
    )
