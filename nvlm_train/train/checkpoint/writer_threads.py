"""Writes a rank's shards in threads, from copies, and hashes what it writes, while training goes on.

megatron-core forks a process for this. A fork copies the locks that the rank's other threads hold, but
not those threads, so in rare cases a writer waited for ever, and its rank waited for the writer. A fork
also copies the rank's sockets and file locks. Threads have neither problem, and the slow parts (writing,
torch's copies into the file, SHA-256) run without the interpreter's lock.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import os
import queue
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCaller, AsyncRequest
from torch.distributed.checkpoint import filesystem

from nvlm_train.train.checkpoint.directory import disk_trouble
from nvlm_train.train.checkpoint.manifest import FileDigest

Bucket = tuple[str, str, tuple[list[Any], list[Any]]]
"""One file of megatron-core's: its path, its key, and what goes into it: (item, bytes), (item, tensor)."""
_Written = tuple[Any, dict[str, FileDigest]]
"""What megatron-core wants to know about a file, or the exception that ended it; and its digest by name."""


class WriterThreads(AsyncCaller):
    """Takes the place of megatron-core's writer processes: one thread per file, one save at a time."""

    def __init__(self) -> None:
        self.digests: dict[str, FileDigest] = {}
        """Digests of this rank's files of the last save, by name."""
        self.copied: torch.cuda.Event | None = None
        """What the threads of the next save wait for before they read their copies."""
        self._files: list[Future[_Written]] = []
        self._directory = Path()
        self._results: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def schedule_async_call(self, async_req: AsyncRequest) -> None:
        """Starts the threads. What they write is theirs alone (`sharded_state.write_request`)."""
        self.digests = {}
        if async_req.async_fn is None:  # this rank has nothing to write
            return
        _, buckets, self._results = async_req.async_fn_args
        transforms = async_req.async_fn.args[0]
        self._directory = Path(buckets[0][0]).parent
        threads = ThreadPoolExecutor(len(buckets), thread_name_prefix="checkpoint-writer")
        self._files = [
            threads.submit(_write_file, transforms, bucket, self.copied) for bucket in buckets
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


def _write_file(transforms: list[Any], bucket: Bucket, copied: torch.cuda.Event | None) -> _Written:
    """Writes one file by torch's own function for an item, as megatron-core does."""
    path, key, (data, tensors) = bucket
    if copied is not None:
        copied.synchronize()
    try:
        with contextlib.closing(HashedFile(Path(path))) as file:
            results = [
                filesystem._write_item(*transforms, file, content, item, key, **_options())  # type: ignore[call-arg]
                for item, content in (*data, *tensors)
            ]
            file.sync()
    # Of whatever kind it is: it is passed on, so that all ranks learn of it.
    except Exception as error:
        return error, {}
    return results, {Path(path).name: file.digest}


def _options() -> dict[str, Any]:
    """Returns what newer versions of torch want to be told besides."""
    if "serialization_format" not in inspect.signature(filesystem._write_item).parameters:
        return {}
    return {"serialization_format": filesystem.SerializationFormat.TORCH_SAVE}


class HashedFile:
    """A new file whose bytes are hashed on their way, with what torch asks of a stream.

    Args:
        path: of the file.

    Raises:
        OSError: it cannot be made, or written.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._hash = hashlib.sha256()

    def close(self) -> None:
        """Ends the file, whose digest is known from here on."""
        self._bytes = self._file.tell()
        self._file.close()

    def write(self, content: bytes | memoryview) -> int:
        """Writes and hashes some bytes, and returns their number."""
        self._hash.update(content)
        return self._file.write(content)

    def tell(self) -> int:
        """Returns the number of bytes so far."""
        return self._file.tell()

    def flush(self) -> None:
        """Hands the bytes to the system."""
        self._file.flush()

    def sync(self) -> None:
        """Waits until the bytes are on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    @property
    def digest(self) -> FileDigest:
        """Size and hash of a file that was closed."""
        return FileDigest(self._bytes, self._hash.hexdigest())
