"""Writes a rank's shards in threads, from copies, and takes their digests, while training goes on.

megatron-core forks a process for it. A fork copies the locks that the rank's other threads hold, but not
those threads: rarely, a writer waited for ever, and its rank for the writer. It copies the rank's sockets
and file locks too. Threads need none of that, and what takes long here (writing, torch's copies into the
file, SHA-256) runs without the interpreter's lock.
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCaller, AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from nvlm_train.train.checkpoint.directory import disk_trouble
from nvlm_train.train.checkpoint.manifest import FileDigest, digest_file

Bucket = tuple[str, str, tuple[list[Any], list[Any]]]
"""A file of megatron-core's: its path, its key, (item, bytes) and (item, tensor) to write into it."""
_Written = tuple[Any, dict[str, FileDigest]]
"""What megatron-core wants to know of a file, or the exception that ended it; its digest by name."""


class WriterThreads(AsyncCaller):
    """megatron-core's caller of writers: a thread for each file of a save, one save at a time."""

    def __init__(self) -> None:
        self.digests: dict[str, FileDigest] = {}
        """Of this rank's files of the last save, by name."""
        self._files: list[Future[_Written]] = []
        self._directory = Path()
        self._results: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def schedule_async_call(self, async_req: AsyncRequest) -> None:
        """Copies what is to be written and starts the threads."""
        self.digests = {}
        if async_req.async_fn is None:  # this rank has nothing to write
            return
        _, buckets, self._results = async_req.async_fn_args
        transforms = async_req.async_fn.args[0]
        self._directory = Path(buckets[0][0]).parent
        threads = ThreadPoolExecutor(len(buckets), thread_name_prefix="checkpoint-writer")
        self._files = [
            threads.submit(_write_file, transforms, number, bucket)
            for number, bucket in enumerate(_copies(buckets, async_req.preload_fn))
        ]
        threads.shutdown(wait=False)

    def is_current_async_call_done(self, blocking: bool = False, no_dist: bool = False) -> bool:
        """Whether all ranks have written, as megatron-core asks it; waits when `blocking`."""
        is_busy = not all(file.done() for file in self._files)
        is_done = not is_busy if no_dist else self.sync_all_async_calls(is_busy)
        if not is_done and not blocking:
            return False
        self.close()
        return True

    def close(self, abort: bool = False) -> None:
        """Waits for the threads and tells megatron-core what they wrote."""
        if not self._files:
            return
        written, self._files = [file.result() for file in self._files], []
        failures = [result for result, _ in written if isinstance(result, Exception)]
        if failures:
            self._results.put(RuntimeError(disk_trouble(self._directory) or str(failures[0])))
            return
        self.digests = {name: digest for _, found in written for name, digest in found.items()}
        self._results.put({number: result for number, (result, _) in enumerate(written)})

    def __del__(self) -> None:
        """The base class raises here."""


def _copies(buckets: list[Bucket], to_host: Callable[[], list[Bucket]]) -> list[Bucket]:
    """The buckets with tensors that training does not change: `to_host` copies those of a GPU only."""
    return [
        (path, key, (data, _own(tensors, on_host)))
        for (path, key, (data, tensors)), (_, _, (_, on_host)) in zip(
            buckets, to_host(), strict=True
        )
    ]


def _own(tensors: list[Any], on_host: list[Any]) -> list[Any]:
    return [
        (item, copy.clone() if copy is tensor else copy)
        for (item, tensor), (_, copy) in zip(tensors, on_host, strict=True)
    ]


def _write_file(transforms: list[Any], number: int, bucket: Bucket) -> _Written:
    """Writes one file by megatron-core's own function, then reads it back from the page cache."""
    result: queue.Queue[Any] = queue.Queue()
    count: queue.Queue[int] = queue.Queue()
    count.put(number)
    FileSystemWriterAsync.write_preloaded_data(
        transforms, number, bucket, result, count, use_fsync=True
    )
    _, written = result.get()
    if isinstance(written, Exception):
        return written, {}
    path = Path(bucket[0])
    try:
        return written, {path.name: digest_file(path)}
    except OSError as error:  # the other ranks have to hear of it
        return error, {}
