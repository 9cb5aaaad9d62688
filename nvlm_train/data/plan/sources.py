"""The sources of a blend: opened, added up, and checked against what a stage tolerates.

Only a few numbers of every shard stay in memory (see `index.shard_set`).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nvlm_train.data.index.files import IndexFiles
from nvlm_train.data.index.lengths import ShardLengths
from nvlm_train.data.index.reader import ShardReader
from nvlm_train.data.index.shard_set import OpenFiles, ShardNumbers, ShardSet
from nvlm_train.data.plan.data_recipe import Blend, SourceConfig, WeightBy, missing_shard
from nvlm_train.data.samples.encoder import SampleEncoder
from nvlm_train.data.shards.store import Store
from nvlm_train.errors import ShardError, TrainingError

_EXAMPLES = 3
"""Unusable samples of a kind that a table remembers and a message names."""


@dataclass(frozen=True)
class UnusableRows:
    """The samples of a source that cannot be used for one kind of reason."""

    count: int
    first: tuple[tuple[int, int], ...]
    """(shard, row) of the first few."""


@dataclass(frozen=True, eq=False)
class ShardTable:
    """What stays in memory of a source's shards, shard after shard."""

    names: tuple[str, ...]
    """The names as the data recipe writes them."""
    num_samples: NDArray[np.int64]
    """[shards]."""
    num_usable: NDArray[np.int64]
    """[shards]."""
    digests: NDArray[np.uint8]
    """[shards, 32]: SHA-256 of the contents."""
    lengths_digest: str
    """Equal digests mean equal lengths of all samples."""
    encoding: str
    """The encoder's fingerprint: equal ones, of equal contents, mean equal tokens of all samples."""
    num_truncated: int
    num_tokens: int
    num_trained: int
    num_tiles: int
    max_tiles: int
    """Tiles of the sample that has most."""
    unusable: dict[str, UnusableRows]
    """Kind of reason -> the samples."""

    def digest(self, shard: int) -> str:
        """Returns the SHA-256 of the shard's contents, as hexadecimal digits."""
        content: bytes = self.digests[shard].tobytes()
        return content.hex()


@dataclass(frozen=True, eq=False)
class Source:
    """A source of the blend."""

    name: str
    weight: float
    """Its share of the samples drawn, relative to the other sources' weights."""
    table: ShardTable
    readers: Sequence[ShardReader]
    lengths: Sequence[ShardLengths]
    max_draws: int | None = None
    """Draws after which the source leaves the blend: its epochs and max_samples."""

    @property
    def num_samples(self) -> int:
        """Samples of all its shards."""
        return int(self.table.num_samples.sum())

    @property
    def num_usable(self) -> int:
        """Samples that can be trained on."""
        return int(self.table.num_usable.sum())

    @property
    def num_unusable(self) -> int:
        """Samples that cannot be trained on."""
        return self.num_samples - self.num_usable

    @property
    def num_truncated(self) -> int:
        """Samples that are cut at the sequence length."""
        return self.table.num_truncated


@dataclass(frozen=True)
class UnusableKind:
    """Samples of a blend that cannot be used for one kind of reason."""

    kind: str
    count: int
    examples: tuple[str, ...]
    """`sample=... in shard=...: reason`, a few."""


def open_sources(
    blend: Blend, store: Store, encoder: SampleEncoder, index_dir: str | None = None
) -> list[Source]:
    """Opens every source of the blend; shards without stored index and lengths are read first.

    Args:
        blend: with the names of all shards (see `list_shards`).
        store: opens shards by these names.
        encoder: of the stage.
        index_dir: where indexes and lengths are stored; None for beside the shards.

    Raises:
        ShardError: a shard that is missing or torn.
    """
    files, open_files = IndexFiles(index_dir, unwritten={}), OpenFiles()
    return [
        _open_source(blend, config, store, encoder, files, open_files) for config in blend.sources
    ]


def _open_source(
    blend: Blend,
    config: SourceConfig,
    store: Store,
    encoder: SampleEncoder,
    files: IndexFiles,
    open_files: OpenFiles,
) -> Source:
    shards = ShardSet(config.shards, config.fields, store, files, encoder, open_files)
    numbers: list[ShardNumbers] = []
    for number, name in enumerate(config.shards):
        try:
            numbers.append(shards.numbers(number))
        except FileNotFoundError as error:
            raise missing_shard(blend.name, config, name, store) from error
        except OSError as error:
            raise ShardError(
                f"shard={store.path(name)} cannot be read: {error}; blend={blend.name} "
                f"source={config.name} names it"
            ) from error
    table = _table(config.shards, numbers, encoder.tokens_fingerprint)
    num_usable = int(table.num_usable.sum())
    return Source(
        name=config.name,
        weight=_weight(config, blend.weight_by, table.num_trained, num_usable),
        table=table,
        readers=shards.readers,
        lengths=shards.lengths,
        max_draws=_max_draws(config, num_usable),
    )


def _weight(config: SourceConfig, weight_by: WeightBy, num_trained: int, num_usable: int) -> float:
    """Returns the source's share of the samples drawn."""
    if weight_by == "trained_tokens" and num_usable > 0:
        return config.weight / (num_trained / num_usable)
    return config.weight


def _max_draws(config: SourceConfig, num_usable: int) -> int | None:
    limits = [] if config.max_samples is None else [config.max_samples]
    if config.epochs is not None:
        limits.append(max(1, int(config.epochs * num_usable)))
    return min(limits, default=None)


def _table(names: tuple[str, ...], shards: Sequence[ShardNumbers], encoding: str) -> ShardTable:
    lengths = [shard.lengths for shard in shards]
    digests = bytes.fromhex("".join(shard.digest for shard in shards))
    return ShardTable(
        names=names,
        num_samples=np.array([shard.num_samples for shard in shards], dtype=np.int64),
        num_usable=np.array([each.num_usable for each in lengths], dtype=np.int64),
        digests=np.frombuffer(digests, dtype=np.uint8).reshape(-1, 32),
        lengths_digest=hashlib.sha256(
            "".join(each.digest for each in lengths).encode()
        ).hexdigest(),
        encoding=encoding,
        num_truncated=sum(each.num_truncated for each in lengths),
        num_tokens=sum(each.num_tokens for each in lengths),
        num_trained=sum(each.num_trained for each in lengths),
        num_tiles=sum(each.num_tiles for each in lengths),
        max_tiles=max((each.max_tiles for each in lengths), default=0),
        unusable=_unusable(shards),
    )


def _unusable(shards: Sequence[ShardNumbers]) -> dict[str, UnusableRows]:
    found: dict[str, UnusableRows] = {}
    for number, shard in enumerate(shards):
        for kind, (count, rows) in shard.lengths.unusable.items():
            before = found.get(kind, UnusableRows(0, ()))
            first = (*before.first, *((number, row) for row in rows))[:_EXAMPLES]
            found[kind] = UnusableRows(before.count + count, first)
    return found


def unusable_kinds(sources: Sequence[Source]) -> tuple[UnusableKind, ...]:
    """Returns the reasons, grouped by the text before their first colon, most frequent first."""
    counts: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    for source in sources:
        for kind, unusable in source.table.unusable.items():
            counts[kind] += unusable.count
            shown = examples.setdefault(kind, [])
            wanted = unusable.first[: _EXAMPLES - len(shown)]
            shown += [_example(source, shard, row) for shard, row in wanted]
    return tuple(
        UnusableKind(kind, count, tuple(examples[kind])) for kind, count in counts.most_common()
    )


def _example(source: Source, shard: int, row: int) -> str:
    reader, reason = source.readers[shard], source.lengths[shard].reasons[row]
    return f"sample={reader.key(row)} in shard={reader.name}: {reason}"


def check_tiles(sources: Sequence[Source], limit: int | None) -> None:
    """Raises TrainingError: a sample of more tiles than `batch.max_tiles_per_pack`."""
    for source in sources:
        if limit is not None and source.table.max_tiles > limit:
            raise TrainingError(
                f"batch.max_tiles_per_pack={limit}: source={source.name} has a sample of "
                f"{source.table.max_tiles} tiles, which no pack could hold; use at least that, "
                "or fewer tiling.max_tiles"
            )


def check_skipped(
    sources: Sequence[Source], unusable: Sequence[UnusableKind], max_skipped_fraction: float
) -> None:
    """Compares the unusable share of what would be drawn with the recipe's tolerance.

    Raises:
        TrainingError: the share is larger, or a source has no usable sample.
    """
    examples = "\n".join(f"  {text}" for kind in unusable for text in kind.examples)
    for source in sources:
        if source.num_unusable == source.num_samples:
            raise TrainingError(
                f"source={source.name} has no usable sample, for example\n{examples}"
            )
    share = skipped_share(sources)
    if share > max_skipped_fraction:
        raise TrainingError(
            f"{share:.2%} of the samples drawn cannot be used, more than "
            f"loader.max_skipped_fraction={max_skipped_fraction}; mend them or raise the "
            f"limit:\n{examples}"
        )


def skipped_share(sources: Sequence[Source]) -> float:
    """Returns the share of samples that cannot be used among those that the weights would draw."""
    total = sum(source.weight for source in sources)
    return sum(s.weight / total * s.num_unusable / s.num_samples for s in sources)
