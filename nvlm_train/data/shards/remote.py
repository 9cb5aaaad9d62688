"""Shards behind an fsspec URL: every read is one range request, tried again when that can help."""

from __future__ import annotations

import io
from typing import IO, TYPE_CHECKING, Any

from nvlm_train.data.shards.retry import DEFAULT_RETRY, RetryPolicy, try_again
from nvlm_train.data.shards.tar import Stamp
from nvlm_train.errors import ShardError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

STREAM_BLOCK = 8 << 20
"""Bytes of one request when a tar is read from its beginning to its end."""
_VERSION_FIELDS = ("ETag", "Last-Modified")


class RemoteShard:
    """A tar that fsspec reads.

    Raises:
        ShardError: the URL's protocol needs a package that is not installed.
    """

    def __init__(self, path: str, retry: RetryPolicy = DEFAULT_RETRY) -> None:
        import fsspec

        self.path = path
        self._retry = retry
        try:
            self._files, self._name = fsspec.core.url_to_fs(path)
        except (ImportError, ValueError) as error:
            raise ShardError(
                f"shard={path} cannot be opened: {error}; install the file system's package "
                "(aiohttp for http, s3fs for s3, gcsfs for gs) or correct the URL"
            ) from error

    def stamp(self) -> Stamp:
        self._files.invalidate_cache()
        info: dict[str, Any] = try_again(
            self.path, self._retry, lambda: self._files.info(self._name)
        )
        if info.get("size") is None:
            raise ShardError(
                f"shard={self.path}: the server does not tell its size; "
                "shards are read by ranges: serve them from a store that knows their sizes"
            )
        # fsspec's own key of an HTTP file is its URL, which does not change with the content.
        version = next((info[name] for name in _VERSION_FIELDS if info.get(name)), None)
        return Stamp(int(info["size"]), str(version or self._files.ukey(self._name)))

    def read(self, offset: int, size: int, stamp: Stamp) -> bytes:
        end = min(offset + size, stamp.size)
        return try_again(self.path, self._retry, lambda: self._range(offset, end))

    def _range(self, start: int, end: int) -> bytes:
        if start >= end:
            return b""
        data: bytes = self._files.cat_file(self._name, start=start, end=end)
        if len(data) > end - start:
            raise ShardError(
                f"shard={self.path}: {len(data)} bytes came where {end - start} were asked for; "
                "the server does not answer range requests: use one that does, or a local copy"
            )
        if len(data) < end - start:
            raise EOFError(f"{len(data)} of {end - start} bytes came")
        return data

    def open(self) -> IO[bytes]:
        return io.BufferedReader(_RangeStream(self, self.stamp()), STREAM_BLOCK)

    def sibling(self, suffix: str) -> str:
        return self.path + suffix


class _RangeStream(io.RawIOBase):
    """Reads the whole tar as a stream of range requests, so that each can be tried again."""

    def __init__(self, shard: RemoteShard, stamp: Stamp) -> None:
        self._shard = shard
        self._stamp = stamp
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._stamp.size}
        self._position = max(0, start[whence] + offset)
        return self._position

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        data = self._shard.read(self._position, len(view), self._stamp)
        view[: len(data)] = data
        self._position += len(data)
        return len(data)
