"""Writes a rank's shards in threads, from copies, and hashes them, while training goes on.

megatron-core forks a process for this. A fork copies the locks that the rank's other threads hold, but
not those threads, so in rare cases a writer waited for ever, and its rank waited for the writer. A fork
also copies the rank's sockets and file locks. Threads have neither problem, and the slow parts (writing,
torch's copies into the file, SHA-256) run without the interpreter's lock.
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
"""One file of megatron-core's: its path, its key, and what goes into it: (item, bytes), (item, tensor)."""
_Written = tuple[Any, dict[str, FileDigest]]
"""What megatron-core wants to know about a file, or the exception that ended it; and its digest by name."""


class WriterThreads(AsyncCaller):
    """Takes the place of megatron-core's writer processes: one thread per file, one save at a time."""

    def __init__(self) -> None:
        self.digests: dict[str, FileDigest] = {}
        """Digests of this rank's files of the last save, by name."""
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
        """Returns whether all ranks have written; waits until they have when `blocking`.

        megatron-core calls it, with `no_dist` to ask about this rank alone.
        """
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
        """Does nothing, because the base class raises here."""


def _copies(buckets: list[Bucket], to_host: Callable[[], list[Bucket]]) -> list[Bucket]:
    """Returns the buckets with copies of all tensors. `to_host` itself copies only a GPU's tensors."""
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
    except OSError as error:  # it is passed on, so that all ranks learn of it
        return error, {}
