"""The sources of a blend: what is in their shards, and the shards themselves, opened when needed.

For every shard a few numbers stay in memory; indexes and lengths are mapped files of which a blend
keeps the most recently used ones open. So a blend's memory grows with its shards, not its samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from nvlm_train.data.index.lengths import ShardLengths
from nvlm_train.data.index.reader import ShardReader

MAX_OPEN = 256
"""Mapped files of a blend that stay open: each holds one descriptor."""

_EXAMPLES = 3

T = TypeVar("T")
Recent = Callable[[Callable[[int], Any], int], Any]


def recently_used() -> Recent:
    """Calls `open_one(shard)`, or returns what it gave before: the last `MAX_OPEN` results."""
    return lru_cache(maxsize=MAX_OPEN)(lambda open_one, shard: open_one(shard))


class OpenedLater(Sequence[T]):
    """A sequence of `count` whose items are opened when they are asked for."""

    def __init__(self, count: int, open_one: Callable[[int], T], recent: Recent) -> None:
        self._count = count
        self._open_one = open_one
        self._recent = recent

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, number: int) -> T: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[T]: ...
    def __getitem__(self, number: int | slice) -> T | Sequence[T]:
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(self._count))]
        if not -self._count <= number < self._count:
            raise IndexError(f"shard={number} of {self._count}")
        opened: T = self._recent(self._open_one, int(number) % self._count)
        return opened

    def __iter__(self) -> Iterator[T]:
        return (self[number] for number in range(self._count))


@dataclass(frozen=True, eq=False)
class ShardTable:
    """What of a source's shards stays in memory, shard after shard."""

    names: tuple[str, ...]
    """As the data recipe writes them."""
    num_samples: NDArray[np.int64]
    num_usable: NDArray[np.int64]
    digests: NDArray[np.uint8]
    """[shards, 32]: of the contents."""
    lengths_digest: str
    """Equal digests mean equal lengths of all samples."""
    encoding: str
    """The encoder's: equal ones, of equal contents, mean equal tokens of all samples."""
    num_truncated: int
    num_tokens: int
    num_trained: int
    num_tiles: int
    max_tiles: int
    """Tiles of the sample that has most."""
    unusable: dict[str, tuple[int, tuple[tuple[int, int], ...]]]
    """Kind -> (how many samples, (shard, row) of the first few)."""

    def digest(self, shard: int) -> str:
        """SHA-256 of the shard's contents, as hexadecimal digits."""
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
        return int(self.table.num_samples.sum())

    @property
    def num_usable(self) -> int:
        return int(self.table.num_usable.sum())

    @property
    def num_unusable(self) -> int:
        return self.num_samples - self.num_usable

    @property
    def num_truncated(self) -> int:
        return self.table.num_truncated


@dataclass(frozen=True)
class UnusableKind:
    """Samples of a blend that cannot be used for one kind of reason."""

    kind: str
    count: int
    examples: tuple[str, ...]
    """`sample=... in shard=...: reason`, a few."""


def unusable_kinds(sources: Sequence[Source]) -> tuple[UnusableKind, ...]:
    """Reasons grouped by the text before their first colon, most frequent first."""
    counts: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    for source in sources:
        for kind, (count, places) in source.table.unusable.items():
            counts[kind] += count
            shown = examples.setdefault(kind, [])
            shown += [_example(source, *place) for place in places[: _EXAMPLES - len(shown)]]
    return tuple(
        UnusableKind(kind, count, tuple(examples[kind])) for kind, count in counts.most_common()
    )


def _example(source: Source, shard: int, row: int) -> str:
    reader, reason = source.readers[shard], source.lengths[shard].reasons[row]
    return f"sample={reader.key(row)} in shard={reader.name}: {reason}"
