"""A copy of a shard on a node's disk, held open and locked against deletion while it is read."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO


class ShardCopy:
    """An open copy. Its shared lock, which keeps it from being deleted, ends with the object."""

    def __init__(self, stream: IO[bytes], path: Path) -> None:
        self._stream = stream
        self._path = path
        self.last_read = 0.0

    @classmethod
    def open(cls, path: Path) -> ShardCopy | None:
        """The copy, or None where there is none (any more)."""
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
        """Marks the copy as used now: the order in which copies are deleted."""
        os.utime(self._stream.fileno())

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes at `offset`, fewer at the end."""
        return os.pread(self._stream.fileno(), size, offset)

    def stream(self) -> IO[bytes]:
        """A stream of its own over the whole copy; it shares no position with others."""
        return self._path.open("rb")


def try_lock(stream: IO[bytes]) -> bool:
    """Whether nobody else had a lock on the file, and this process now has it alone."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
