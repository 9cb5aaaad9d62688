"""What the forked writer process of a rank does: write the rank's shards, and take their digests.

megatron-core forks one more process a file and waits for each without looking whether it lives: when the
kernel kills one for memory, the save never ends. Here threads of the one writer write the files; a writer
that dies is a save that failed.
"""

from __future__ import annotations

import ctypes
import gc
import os
import queue
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from nvlm_train.train.checkpoint_files import disk_trouble
from nvlm_train.train.manifest import FileDigest, digest_file
from nvlm_train.train.mcore_fixes import ResultFile

_C_LIBRARY = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""


def with_digests(request: AsyncRequest, digests: ResultFile) -> AsyncRequest:
    """The request with a writer that puts {file name: FileDigest} into `digests`."""
    if request.async_fn is None:  # this rank has nothing to write
        return request
    transforms = request.async_fn.args[0]
    writer = partial(_write, os.getpid(), transforms, digests)
    return request._replace(async_fn=writer)


def _write(
    parent: int,
    transforms: list[Any],
    digests: ResultFile,
    rank: int,
    buckets: list[tuple[str, str, Any]],
    results: ResultFile,
) -> None:
    die_with(parent)
    _own_nothing_of_the_parent()
    write = partial(_write_bucket, transforms)
    with ThreadPoolExecutor(len(buckets)) as threads:
        written = list(threads.map(write, range(len(buckets)), buckets))
    failures = [result for result, _ in written if isinstance(result, Exception)]
    if failures:
        trouble = disk_trouble(Path(buckets[0][0]).parent)
        results.put(RuntimeError(trouble or str(failures[0])))
        return
    digests.put({name: digest for _, found in written for name, digest in found.items()})
    results.put({number: result for number, (result, _) in enumerate(written)})


def _own_nothing_of_the_parent() -> None:
    """Only the thread that forked is here: what belongs to the parent's other threads must not be touched."""
    # A collected process group would wait for its threads for ever. What is frozen is never collected.
    gc.freeze()
    # OpenMP's threads are missing too; with one thread they are not asked.
    torch.set_num_threads(1)


def _write_bucket(
    transforms: list[Any], number: int, bucket: tuple[str, str, Any]
) -> tuple[Any, dict[str, FileDigest]]:
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
    return written, {path.name: digest_file(path)}


def die_with(parent: int) -> None:
    """Lets the kernel end this process when `parent` dies: a killed run leaves no writer behind."""
    prctl: Callable[..., int] | None = getattr(_C_LIBRARY, "prctl", None)
    if prctl is None:  # not Linux
        return
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
