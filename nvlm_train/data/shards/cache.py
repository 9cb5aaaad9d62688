"""Copies of remote shards on a node's own disk, shared by its ranks and bounded in size.

A shard is downloaded whole, by one rank, while the others wait for it: a lock file per shard. The
copy has its name only when it is complete. A rank that reads a copy holds a shared lock on it, and
only copies that nobody holds are deleted, least recently used ones first. Where no room can be
made, samples are read from the store by range instead, so the limit is never passed.
Locks are `flock`: they vanish with the process that held them.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from nvlm_train.data.shards.remote import RemoteShard
from nvlm_train.data.shards.tar import Stamp
from nvlm_train.errors import ShardError


class ShardCopy:
    """An open copy. Its shared lock, which keeps it from being deleted, ends with the object."""

    def __init__(self, stream: IO[bytes], path: Path) -> None:
        self._stream = stream
        self._path = path
        self.last_read = 0.0

    @classmethod
    def open(cls, path: Path) -> ShardCopy | None:
        """Opens the copy; None where there is none (any more)."""
        try:
            stream = path.open("rb")
        except FileNotFoundError:
            return None
        fcntl.flock(stream, fcntl.LOCK_SH)
        if os.fstat(stream.fileno()).st_nlink == 0:  # deleted between opening and locking
            stream.close()
            return None
        copy = cls(stream, path)
        copy.touch()
        return copy

    def __del__(self) -> None:
        self._stream.close()

    def touch(self) -> None:
        """Marks the copy as used now, which decides the order in which copies are deleted."""
        os.utime(self._stream.fileno())

    def read(self, offset: int, size: int) -> bytes:
        """Reads `size` bytes at `offset`, fewer at the end."""
        return os.pread(self._stream.fileno(), size, offset)

    def stream(self) -> IO[bytes]:
        """Opens a stream over the whole copy; it shares no position with others."""
        return self._path.open("rb")


def try_lock(stream: IO[bytes]) -> bool:
    """Takes a lock on the file; False when somebody else has one."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


DOWNLOAD_BLOCK = 16 << 20
"""Bytes of one request of a download."""
IDLE_S = 60.0

_log = logging.getLogger(__name__)


class ShardCache:
    """A directory of shard copies and of what is stored beside them. Thread-safe.

    Args:
        directory: on a disk of the node; several ranks and several runs may share it.
        max_bytes: limit on the copies, those being downloaded included. Indexes are not counted.
        idle_s: after so many seconds without a read this process lets go of a copy, and others may
            delete it; as long a full cache is not asked for room again.

    Raises:
        ShardError: the directory cannot be made.
    """

    def __init__(self, directory: str, max_bytes: int, idle_s: float = IDLE_S) -> None:
        self._root = Path(directory)
        self._max_bytes = max_bytes
        self._idle_s = idle_s
        self._full_until = 0.0
        self._held: dict[str, ShardCopy] = {}
        self._guard = threading.Lock()
        try:
            for name in ("copies", "locks", "beside"):
                (self._root / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ShardError(
                f"loader.cache_dir={directory} cannot be made: {error}; name a directory on a "
                "disk of the node that this user may write"
            ) from error

    def beside(self, url: str, suffix: str) -> str:
        """Returns the local path of a file that belongs beside the shard."""
        name = url.rstrip("/").rpartition("/")[2]
        return str(self._root / "beside" / f"{_digest(url)}-{name}{suffix}")

    def copy(self, shard: RemoteShard, stamp: Stamp) -> ShardCopy | None:
        """Returns the node's copy, downloaded if need be; None when no room can be made for it.

        Raises:
            FileNotFoundError: the shard is gone.
            ShardError: the shard cannot be read, or is no longer the one with this stamp.
        """
        name = _digest(shard.path, str(stamp.size), stamp.version)
        copy = self._hold(name)
        if copy is not None or time.monotonic() < self._full_until:
            return copy
        with self._locked(f"{name}.lock"):
            copy = self._hold(name)  # another rank may have been faster
            if copy is None and self._reserve(shard.path, name, stamp.size):
                self._download(shard, stamp, name)
                copy = self._hold(name)
        return copy

    def _hold(self, name: str) -> ShardCopy | None:
        """Returns the copy with a shared lock on it, or None where there is none."""
        with self._guard:
            copy = self._held.get(name)
            if copy is None:
                copy = ShardCopy.open(self._root / "copies" / f"{name}.tar")
                if copy is None:
                    return None
                self._held[name] = copy
            copy.last_read = time.monotonic()
            self._let_go_of_idle()
            return copy

    def _let_go_of_idle(self) -> None:
        """Lets go of copies that were not read for long; each closes when its last reader is done."""
        limit = time.monotonic() - self._idle_s
        for name in [name for name, copy in self._held.items() if copy.last_read < limit]:
            self._held.pop(name).touch()

    def _reserve(self, url: str, name: str, size: int) -> bool:
        """Makes room and takes it with a file of full size, so that other downloads count it too."""
        partial = self._root / "copies" / f"{name}.partial"
        with self._locked("room.lock"):
            partial.unlink(missing_ok=True)  # of a rank that was killed: this shard's lock is ours
            if self._make_room(size):
                with partial.open("wb") as stream:
                    stream.truncate(size)
                return True
        self._full_until = time.monotonic() + self._idle_s
        _log.warning(
            "no room for a copy of %s (%d bytes) in loader.cache_dir=%s: %d bytes are allowed, and "
            "what is there is in use; for %.0f s samples are read from the store",
            url, size, self._root, self._max_bytes, self._idle_s,
        )  # fmt: skip
        return False

    def _make_room(self, size: int) -> bool:
        """Deletes copies that nobody holds, least recently used first, until `size` bytes fit."""
        files = [(path.stat(), path) for path in (self._root / "copies").iterdir()]
        used = sum(status.st_size for status, _ in files)
        for status, path in sorted(files, key=lambda file: file[0].st_mtime_ns):
            if used + size <= self._max_bytes:
                break
            used -= status.st_size if self._delete(path) else 0
        return used + size <= self._max_bytes

    def _delete(self, path: Path) -> bool:
        """Deletes the copy; False when a rank reads it, or still downloads it."""
        guard = self._root / "locks" / f"{path.stem}.lock" if path.suffix == ".partial" else path
        with guard.open("ab" if guard != path else "rb") as stream:
            if not try_lock(stream):
                return False
            path.unlink()
        return True

    def _download(self, shard: RemoteShard, stamp: Stamp, name: str) -> None:
        partial = self._root / "copies" / f"{name}.partial"
        started = time.monotonic()
        try:
            with partial.open("r+b") as stream:
                for offset in range(0, stamp.size, DOWNLOAD_BLOCK):
                    self._write(stream, shard.read(offset, DOWNLOAD_BLOCK, stamp))
            if shard.stamp() != stamp:
                raise ShardError(
                    f"changed shard={shard.path}: another version was stored since it was indexed; "
                    "restore it, or start a new run"
                )
            with self._locked("room.lock"):
                partial.replace(partial.with_suffix(".tar"))
        except BaseException:
            with self._locked("room.lock"):
                partial.unlink(missing_ok=True)
            raise
        seconds = time.monotonic() - started
        _log.info("copied %s (%d bytes) in %.1f s", shard.path, stamp.size, seconds)

    def _write(self, stream: IO[bytes], data: bytes) -> None:
        """Writes through to the disk: a copy that has its name must survive a power cut whole."""
        try:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        except OSError as error:
            raise ShardError(
                f"loader.cache_dir={self._root} cannot be written: {error}; make room on its disk "
                "or lower loader.cache_gib"
            ) from error

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with (self._root / "locks" / name).open("ab") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield


class CachedShard:
    """A remote shard that is read from the node's copy; its index lies in the cache directory."""

    def __init__(self, remote: RemoteShard, cache: ShardCache) -> None:
        self.path = remote.path
        self._remote = remote
        self._cache = cache

    def stamp(self) -> Stamp:
        return self._remote.stamp()

    def read(self, offset: int, size: int, stamp: Stamp) -> bytes:
        copy = self._cache.copy(self._remote, stamp)
        if copy is None:
            return self._remote.read(offset, size, stamp)
        return copy.read(offset, size)

    def open(self) -> IO[bytes]:
        copy = self._cache.copy(self._remote, self.stamp())
        return self._remote.open() if copy is None else copy.stream()

    def sibling(self, suffix: str) -> str:
        return self._cache.beside(self.path, suffix)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
