"""Files beside a shard, each with arrays and facts: what they hold, how they are read, where they lie.

A file is mapped, not loaded: the ranks of a node share its pages. The format is safetensors (a
length, a JSON header, raw arrays, aligned): nothing is unpickled, and its own tools can list such a
file. What is not an array is JSON in the header's metadata, so that counts and digests are known
without touching an array.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import mmap
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvlm_train.data.shards.tar import Shard, is_remote

_KEY = "nvlm"
_LENGTH_BYTES = 8
_FIRST_READ = 4096
"""Bytes in which nearly every header lies."""
_MAX_HEADER = 1 << 26
_DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}

Arrays = dict[str, NDArray[Any]]

_log = logging.getLogger(__name__)
_warned_directories: set[str] = set()


@dataclass(frozen=True)
class ArrayFile:
    """A mapped file. The map closes when the last array is let go."""

    facts: dict[str, Any]
    """The facts that were written beside the arrays."""
    arrays: Arrays
    """Read-only views of the map."""


class Texts:
    """N texts, kept as one block of UTF-8 and where each ends, so that they can be mapped."""

    __slots__ = ("_bytes", "_ends")

    def __init__(self, utf8: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        self._bytes = utf8
        self._ends = ends

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int) -> str:
        if not 0 <= number < len(self._ends):
            raise IndexError(f"text={number} of {len(self._ends)}")
        start = int(self._ends[number - 1]) if number else 0
        return self._bytes[start : int(self._ends[number])].tobytes().decode("utf-8")

    def tolist(self) -> list[str]:
        """Returns all the texts."""
        return [self[number] for number in range(len(self))]

    def arrays(self, name: str) -> Arrays:
        """Returns the texts as arrays for `write_arrays`; `Texts.of` takes them back."""
        return {name: self._bytes, f"{name}_ends": self._ends}

    @staticmethod
    def of(arrays: Mapping[str, NDArray[Any]], name: str) -> Texts:
        """Returns the texts stored under this name. Raises KeyError."""
        return Texts(arrays[name], arrays[f"{name}_ends"])

    @staticmethod
    def pack(texts: Sequence[str]) -> Texts:
        """Makes a block of these texts, in memory."""
        # Reasons quote records, which may hold half a surrogate pair.
        encoded = [text.encode("utf-8", "backslashreplace") for text in texts]
        ends = np.cumsum([len(data) for data in encoded], dtype=np.int64)
        return Texts(np.frombuffer(b"".join(encoded), dtype=np.uint8), ends)


def write_arrays(path: Path, facts: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Writes the file whole or not at all; several processes may do so at once.

    Raises:
        OSError: the directory cannot be written.
    """
    import safetensors.numpy

    data = safetensors.numpy.save(
        {name: np.ascontiguousarray(array) for name, array in arrays.items()},
        {_KEY: json.dumps(facts, sort_keys=True)},
    )
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_facts(path: Path) -> dict[str, Any]:
    """Reads what was written beside the arrays; no array is read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        start = os.pread(descriptor, _FIRST_READ, 0)
        length = _header_length(start)
        if length > len(start) - _LENGTH_BYTES:
            start += os.pread(descriptor, length + _LENGTH_BYTES - len(start), len(start))
    finally:
        os.close(descriptor)
    return _parse(start[_LENGTH_BYTES : _LENGTH_BYTES + length])[0]


def open_arrays(path: Path) -> ArrayFile:
    """Maps the file; pages are read when an array is looked at.

    Files are only ever replaced, never written in place, so a map stays valid.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged.
    """
    with path.open("rb") as stream:
        data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    length = _header_length(data[:_LENGTH_BYTES])
    facts, entries = _parse(data[_LENGTH_BYTES : _LENGTH_BYTES + length])
    first = _LENGTH_BYTES + length
    return ArrayFile(facts, {name: _view(data, first, entry) for name, entry in entries.items()})


def _header_length(start: bytes) -> int:
    length = int.from_bytes(start[:_LENGTH_BYTES], "little")
    if len(start) < _LENGTH_BYTES or not 0 < length <= _MAX_HEADER:
        raise ValueError(f"no header: it would have {length} bytes")
    return length


def _parse(header: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the facts, and the entry of every array."""
    try:
        content = json.loads(header)
        facts = json.loads(content.pop("__metadata__")[_KEY])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"header without {error}") from error
    if not isinstance(facts, dict):
        raise ValueError("header without facts")
    return facts, content


def _view(data: mmap.mmap, first: int, entry: Mapping[str, Any]) -> NDArray[Any]:
    try:
        dtype, shape = _DTYPES[entry["dtype"]], [int(size) for size in entry["shape"]]
        start, end = entry["data_offsets"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"an array without {error}") from error
    count = math.prod(shape)
    if not 0 <= start <= end <= len(data) - first or end - start != count * dtype.itemsize:
        raise ValueError(f"an array at bytes {start} to {end} of {len(data) - first}")
    if count == 0:
        return np.empty(shape, dtype)
    return np.frombuffer(data, dtype, count, first + start).reshape(shape)


Unwritten = dict[tuple[str, str], ArrayFile]
"""(shard, suffix) -> what the file would hold."""


@dataclass(frozen=True)
class IndexFiles:
    """Files that belong to shards: `SHARD.tar.index`, `SHARD.tar.lengths-ENCODING`, ..."""

    directory: str | None = None
    """None: beside each shard, or beside the node's copy of a remote one, or nowhere."""
    unwritten: Unwritten | None = None
    """Keeps in memory what cannot be written, for instance in a read-only directory; None lets it
    go, for those that read each shard once."""

    def path(self, shard: Shard, suffix: str) -> Path | None:
        """Returns where the shard's file with this suffix lies.

        A remote shard without a directory has no such place: None.
        """
        if self.directory is not None:
            # Shards of two directories may have the same name.
            place = hashlib.sha256(shard.path.encode()).hexdigest()[:16]
            return Path(self.directory) / f"{place}-{os.path.basename(shard.path)}{suffix}"
        beside = shard.sibling(suffix)
        return None if is_remote(beside) else Path(beside)

    def facts(self, shard: Shard, suffix: str) -> dict[str, Any] | None:
        """Returns what the file's header says; None when the file is missing or damaged."""
        if self.unwritten and (shard.path, suffix) in self.unwritten:
            return self.unwritten[shard.path, suffix].facts
        path = self.path(shard, suffix)
        if path is None:
            return None
        try:
            return read_facts(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            _warn_damaged(path, error)
            return None

    def open(self, shard: Shard, suffix: str) -> ArrayFile | None:
        """Returns the file, mapped; None when it is missing or damaged."""
        if self.unwritten and (shard.path, suffix) in self.unwritten:
            return self.unwritten[shard.path, suffix]
        path = self.path(shard, suffix)
        if path is None:
            return None
        try:
            return open_arrays(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            _warn_damaged(path, error)
            return None

    def write(
        self,
        shard: Shard,
        suffix: str,
        facts: Mapping[str, Any],
        arrays: Mapping[str, NDArray[Any]],
    ) -> None:
        """Stores the file, whole or not at all.

        Where nothing can be written (a read-only directory, a remote store) one warning per
        directory says so, and `unwritten` keeps what the file would hold.
        """
        path = self.path(shard, suffix)
        try:
            if path is None:
                raise PermissionError("not a local directory")
            if self.directory is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
            write_arrays(path, facts, arrays)
        except OSError as error:
            if self.unwritten is not None:
                self.unwritten[shard.path, suffix] = ArrayFile(dict(facts), dict(arrays))
            place = os.path.dirname(shard.path) if self.directory is None else self.directory
            if place not in _warned_directories:
                _warned_directories.add(place)
                _log.warning(
                    "cannot write %s (%s); indexes stay in memory",
                    f"beside the shards in {place}" if self.directory is None else f"in {place}",
                    error,
                )


def _warn_damaged(path: Path, error: Exception) -> None:
    _log.warning("cache=%s cannot be read (%s); it is made again", path, error)
