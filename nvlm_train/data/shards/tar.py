"""Plain WebDataset tars: their names, reading local ones by offset, and writing them.

Local files are read with `pread` (threads share a descriptor, nobody seeks); for anything with a
scheme (`s3://...`) see `remote`, and `store` for which is which.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, Protocol

from nvlm_train.data.shards.retry import DEFAULT_RETRY, RetryPolicy, try_again
from nvlm_train.errors import ShardError

SAMPLES_PER_SHARD = 1000
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
IMAGE_SUFFIX = re.compile(rf"(?:(\d+)\.)?(?:{'|'.join(IMAGE_SUFFIXES)})")
"""`jpg`, or `0.jpg` where a sample has several images."""


@dataclass(frozen=True, slots=True)
class Stamp:
    """Size and version of a shard: they tell cheaply whether it is still the one that was indexed."""

    size: int
    """Bytes."""
    version: str
    """Modification time in nanoseconds, or what a remote store has instead (ETag, generation)."""


class Shard(Protocol):
    """One tar that can be read by offset."""

    path: str

    def stamp(self) -> Stamp:
        """Returns size and version now. Raises FileNotFoundError."""

    def read(self, offset: int, size: int, stamp: Stamp) -> bytes:
        """Reads `size` bytes at `offset`, fewer at the end of the file. `stamp` is the indexed one."""

    def open(self) -> IO[bytes]:
        """Opens the whole tar as a seekable stream."""

    def sibling(self, suffix: str) -> str:
        """Returns the path of a file beside the tar."""


class LocalShard:
    """A tar in a file system."""

    def __init__(self, path: str, retry: RetryPolicy = DEFAULT_RETRY) -> None:
        self.path = path
        self._retry = retry

    def stamp(self) -> Stamp:
        status = os.stat(self.path)
        return Stamp(status.st_size, str(status.st_mtime_ns))

    def read(self, offset: int, size: int, stamp: Stamp) -> bytes:
        return try_again(self.path, self._retry, lambda: self._pread(offset, size, stamp))

    def _pread(self, offset: int, size: int, stamp: Stamp) -> bytes:
        try:
            return os.pread(_descriptor(self.path, stamp).number, size, offset)
        except OSError:
            # A network file system's stale handle stays stale: the next try opens the file again.
            _descriptor.cache_clear()
            raise

    def open(self) -> IO[bytes]:
        return Path(self.path).open("rb")

    def sibling(self, suffix: str) -> str:
        return self.path + suffix


class _Descriptor:
    """An open file that closes when its last reader lets go of it."""

    __slots__ = ("number",)

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


@lru_cache(maxsize=128)
def _descriptor(path: str, stamp: Stamp) -> _Descriptor:
    """Returns the shard's open file; a rewritten shard has another stamp and is opened again."""
    del stamp
    return _Descriptor(path)


def is_remote(path: str) -> bool:
    """Says whether fsspec has to read this path."""
    return "://" in path


def expand_pattern(pattern: str) -> list[str]:
    """Returns the shard names of a brace pattern, in order.

    >>> expand_pattern("x-{000..002}.tar")
    ['x-000.tar', 'x-001.tar', 'x-002.tar']

    Raises:
        ValueError: unbalanced braces.
    """
    import braceexpand

    return list(braceexpand.braceexpand(pattern))


Sample = tuple[str, Mapping[str, Any], list[tuple[str, bytes]]]
"""(key, record for KEY.json, [(suffix, image bytes)]); suffixes as in `jpg` or `0.jpg`."""


@dataclass(frozen=True, slots=True)
class WrittenShard:
    """One finished shard."""

    path: str
    num_samples: int


def write_shards(
    samples: Iterable[Sample],
    pattern: str,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    first_shard: int = 0,
) -> list[WrittenShard]:
    """Writes samples to `pattern % number` (`train-%06d.tar`) with `webdataset.ShardWriter`.

    Numbers start at `first_shard`.

    The same samples make the same bytes. Shards get their names only when all of them are complete.

    Raises:
        ShardError: a key that occurs twice or that WebDataset could not read back; no samples.
    """
    if is_remote(pattern):
        raise ShardError(f"pattern={pattern}: shards are written locally; copy them to the store")
    import webdataset

    files = _PartialFiles()
    seen: set[str] = set()
    # Fixed times and names: the bytes depend on the samples alone.
    writer: Any = webdataset.ShardWriter(
        pattern, samples_per_shard, maxsize=1 << 62, opener=files.create, verbose=0,
        encoder=False, mtime=0, user="nvlm", group="nvlm", start_shard=first_shard,
        post=lambda name: files.finish(name, writer.count),
    )  # fmt: skip
    try:
        with writer:
            for key, record, images in samples:
                _check_key(key, seen)
                _check_suffixes(key, images)
                encoded = json.dumps(record, ensure_ascii=False).encode()
                writer.write({"__key__": key, "json": encoded, **dict(images)})
            if not seen:
                raise ShardError(f"pattern={pattern}: there are no samples to write")
        return files.publish()
    finally:
        files.discard()


class _PartialFiles:
    """Keeps shards under names that no pattern matches until all of them are complete."""

    def __init__(self) -> None:
        self._streams: dict[str, IO[bytes]] = {}
        self._written: list[WrittenShard] = []

    def create(self, name: str) -> IO[bytes]:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        self._streams[name] = Path(name + ".partial").open("wb")  # noqa: SIM115  (closed in finish)
        return self._streams[name]

    def finish(self, name: str, num_samples: int) -> None:
        self._streams[name].close()
        self._written.append(WrittenShard(name, num_samples))

    def publish(self) -> list[WrittenShard]:
        """Gives every shard its name."""
        for shard in self._written:
            os.replace(shard.path + ".partial", shard.path)
        return self._written

    def discard(self) -> None:
        """Removes what was not published."""
        for name, stream in self._streams.items():
            stream.close()
            Path(name + ".partial").unlink(missing_ok=True)


def _check_suffixes(key: str, images: list[tuple[str, bytes]]) -> None:
    """Refuses members that the index would pass over: they would be lost without a word."""
    suffixes = [suffix for suffix, _ in images]
    unknown = [suffix for suffix in suffixes if not IMAGE_SUFFIX.fullmatch(suffix)]
    if unknown or len(set(suffixes)) < len(suffixes):
        raise ShardError(
            f"key={key!r}: image suffixes {suffixes} must differ, and each be one of "
            f"{', '.join(IMAGE_SUFFIXES)}, with a number and a dot before it if there are several"
        )


def _check_key(key: str, seen: set[str]) -> None:
    """Refuses keys that WebDataset, which cuts names at their first dot, could not read back."""
    parts = key.split("/")
    if "." in parts[-1] or any(part in ("", ".", "..") for part in parts):
        raise ShardError(
            f"key={key!r}: a key is a relative name without dots; "
            "everything after the first dot would be read as the member's suffix"
        )
    if key in seen:
        raise ShardError(f"key={key!r} occurs twice; keys name samples and must differ")
    seen.add(key)
