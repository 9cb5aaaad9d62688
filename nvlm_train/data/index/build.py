"""Indexing many shards at once: one process a core, every shard read once.

What is stored already and still fits its shard is not read again, so a second call costs a look at
each shard's header.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass

from nvlm_train.config.model_schema import TokenizerConfig
from nvlm_train.data.index.files import IndexFiles
from nvlm_train.data.index.lengths import load_lengths, read_lengths_summary
from nvlm_train.data.index.reader import ShardReader
from nvlm_train.data.index.shard_index import load_index, read_summary
from nvlm_train.data.processes import processes
from nvlm_train.data.samples.encoder import EncodingSpec, SampleEncoder
from nvlm_train.data.shards.fields import OWN_FIELDS, FieldMapping
from nvlm_train.data.shards.store import DIRECT
from nvlm_train.data.shards.tar import Shard
from nvlm_train.errors import ShardError
from nvlm_train.tokens import Tokenizer


@dataclass(frozen=True)
class Encoding:
    """One stage's way of turning records into tokens; unlike an encoder it can go to a process."""

    tokenizer: TokenizerConfig
    spec: EncodingSpec

    def open(self) -> SampleEncoder:
        """Opens the encoder. Raises ConfigError: the tokenizer cannot be read."""
        return SampleEncoder(Tokenizer(self.tokenizer), self.spec)


@dataclass(frozen=True)
class IndexedShard:
    """The outcome of indexing one shard."""

    path: str
    num_samples: int
    num_bytes: int
    seconds: float
    """CPU seconds."""
    was_known: bool
    """Whether index and lengths were stored already, so that nothing had to be read."""
    error: str = ""
    """The reason why it could not be indexed; empty where it was."""


@dataclass(frozen=True)
class WantedShard:
    """A shard as a source reads it: each field mapping has an index of its own."""

    path: str
    fields: FieldMapping = OWN_FIELDS


class Indexer:
    """Indexes shards in one process; encoders are opened once."""

    def __init__(self, encodings: Sequence[Encoding], files: IndexFiles) -> None:
        self._encoders = [encoding.open() for encoding in encodings]
        self._files = files

    def index(self, wanted: WantedShard, encodings: Sequence[int]) -> IndexedShard:
        """Indexes one shard, with its lengths under the encodings of these numbers."""
        path, fields = wanted.path, wanted.fields
        start, shard = time.process_time(), DIRECT.open(path)
        encoders = [self._encoders[number] for number in encodings]
        try:
            num_bytes = shard.stamp().size
            known = self._known(shard, fields, encoders)
            if known is None:
                index = load_index(shard, self._files, fields)
                reader = ShardReader(path, shard, index, fields)
                for encoder in encoders:
                    load_lengths(reader, encoder, self._files)
            num_samples = len(reader.index) if known is None else known
        except FileNotFoundError:
            return IndexedShard(path, 0, 0, 0.0, False, f"missing shard={path}; correct its name")
        except ShardError as error:
            return IndexedShard(path, 0, 0, 0.0, False, str(error))
        except OSError as error:
            return IndexedShard(path, 0, 0, 0.0, False, f"shard={path} cannot be read: {error}")
        seconds = time.process_time() - start
        return IndexedShard(path, num_samples, num_bytes, seconds, known is not None)

    def _known(
        self, shard: Shard, fields: FieldMapping, encoders: Sequence[SampleEncoder]
    ) -> int | None:
        """Counts the samples of a shard of which everything is stored; None when something is missing."""
        index = read_summary(shard, self._files, fields)
        if index is None:
            return None
        for encoder in encoders:
            if read_lengths_summary(shard, index.digest, encoder, self._files, fields) is None:
                return None
        return index.num_samples


def index_shards(
    shards: Mapping[WantedShard, Sequence[int]],
    encodings: Sequence[Encoding],
    files: IndexFiles,
    num_workers: int,
) -> Iterator[IndexedShard]:
    """Indexes every shard (with the numbers of its encodings), in the order in which they finish.

    A shard that cannot be indexed does not stop the others; its `error` says why.

    Raises:
        ConfigError: a tokenizer that cannot be read.
        ShardError: a process was killed.
    """
    if num_workers <= 1 or len(shards) <= 1:
        indexer = Indexer(encodings, files)
        yield from (indexer.index(shard, numbers) for shard, numbers in shards.items())
        return
    for encoding in encodings:
        encoding.open()  # its errors are the user's: better here than in every process
    with processes(min(num_workers, len(shards)), _start_indexer, encodings, files) as pool:
        work = [pool.submit(_index, shard, numbers) for shard, numbers in shards.items()]
        yield from _as_they_finish(work)


def _as_they_finish(work: Iterable[Future[IndexedShard]]) -> Iterator[IndexedShard]:
    for future in as_completed(work):
        yield future.result()


_indexers: list[Indexer] = []


def _start_indexer(encodings: Sequence[Encoding], files: IndexFiles) -> None:
    _indexers.append(Indexer(encodings, files))


def _index(wanted: WantedShard, encodings: Sequence[int]) -> IndexedShard:
    return _indexers[0].index(wanted, encodings)
