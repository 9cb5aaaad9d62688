"""The shards of one source: a few numbers of each at once, and each of them opened when it is read.

The numbers of a shard come from the headers of its stored files. Indexes and lengths themselves are
mapped files, of which a blend keeps the most recently used ones open; so a blend's memory grows with
its shards, not with its samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, TypeVar, overload

from nvlm_train.data.index.files import IndexFiles
from nvlm_train.data.index.lengths import (
    LengthsSummary,
    ShardLengths,
    lengths_summary,
    load_lengths,
)
from nvlm_train.data.index.reader import ShardReader
from nvlm_train.data.index.shard_index import index_summary, load_index, open_index
from nvlm_train.data.samples.encoder import SampleEncoder
from nvlm_train.data.shards.fields import FieldMapping
from nvlm_train.data.shards.store import Store
from nvlm_train.errors import ShardError

MAX_OPEN = 256
"""Mapped files of a blend that stay open: each holds one descriptor."""

T = TypeVar("T")


class OpenFiles:
    """The files of a blend that were used last; they stay open, at most `limit` of them."""

    def __init__(self, limit: int = MAX_OPEN) -> None:
        self._opened = lru_cache(maxsize=limit)(_call)

    def get(self, open_one: Callable[[int], T], number: int) -> T:
        """Returns `open_one(number)`, or what it returned before where that is still open."""
        opened: T = self._opened(open_one, number)
        return opened


def _call(open_one: Callable[[int], Any], number: int) -> Any:
    return open_one(number)


class OpenedLater(Sequence[T]):
    """A sequence of `count` items that are opened when they are asked for."""

    def __init__(self, count: int, open_one: Callable[[int], T], open_files: OpenFiles) -> None:
        self._count = count
        self._open_one = open_one
        self._open_files = open_files

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
        return self._open_files.get(self._open_one, int(number) % self._count)

    def __iter__(self) -> Iterator[T]:
        return (self[number] for number in range(self._count))


@dataclass(frozen=True, slots=True)
class ShardNumbers:
    """A shard under one encoding in a few numbers."""

    num_samples: int
    digest: str
    """The index's: equal digests mean equal contents."""
    lengths: LengthsSummary


class ShardSet:
    """The shards of one source under one encoding.

    Index and lengths that are not stored are made and stored.

    Args:
        names: as the data recipe writes them.
        fields: where the records lie in the shards.
        store: opens shards by these names.
        files: where indexes and lengths are stored.
        encoder: of the stage.
        open_files: shared by all sources of a blend.
    """

    def __init__(
        self,
        names: Sequence[str],
        fields: FieldMapping,
        store: Store,
        files: IndexFiles,
        encoder: SampleEncoder,
        open_files: OpenFiles,
    ) -> None:
        self._names = names
        self._fields = fields
        self._store = store
        self._files = files
        self._encoder = encoder
        self._digests: dict[int, str] = {}
        self.readers: Sequence[ShardReader] = OpenedLater(len(names), self._reader, open_files)
        """The shards, each with its index mapped. Raises ShardError: the shard's index is not the
        one that was there at the start any more."""
        self.lengths: Sequence[ShardLengths] = OpenedLater(len(names), self._lengths, open_files)
        """The lengths of the shards, mapped."""

    def numbers(self, number: int) -> ShardNumbers:
        """Returns the numbers of one shard, which must be asked for before it is read.

        Raises:
            FileNotFoundError: the shard is missing.
            OSError: the shard cannot be read.
            ShardError: the tar is torn or holds members that are refused.
        """
        shard = self._store.open(self._names[number])
        index = index_summary(shard, self._files, self._fields)
        self._digests[number] = index.digest
        lengths = lengths_summary(
            shard,
            index.digest,
            partial(self._reader, number),
            self._encoder,
            self._files,
            self._fields,
        )
        return ShardNumbers(index.num_samples, index.digest, lengths)

    def _reader(self, number: int) -> ShardReader:
        shard = self._store.open(self._names[number])
        index = open_index(shard, self._files, self._fields)
        if index is None or index.digest != self._digests[number]:
            index = load_index(shard, self._files, self._fields)
        if index.digest != self._digests[number]:
            raise ShardError(
                f"changed shard={shard.path}: digest={index.digest[:12]}, the run began with "
                f"{self._digests[number][:12]}; restore the shard, or start a new run"
            )
        return ShardReader(self._names[number], shard, index, self._fields)

    def _lengths(self, number: int) -> ShardLengths:
        return load_lengths(self._reader(number), self._encoder, self._files)
