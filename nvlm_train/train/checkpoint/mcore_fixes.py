"""Corrects defects of megatron-core 0.16.1 that occur on any device. Each names the defect and its test."""

from __future__ import annotations

import queue
from collections.abc import Callable
from typing import Any

from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy


def keep_results_in_the_process() -> None:
    """Gives megatron-core a plain queue for what checkpoint writers report.

    Its own queue belongs to a `multiprocessing.Manager`, which starts one more interpreter per rank
    (seconds at the first save) and outlives a rank that is killed. Writers are threads here
    (writer_threads.py).

    Raises:
        RuntimeError: megatron-core keeps its queue elsewhere.
    """
    if not hasattr(filesystem_async, "_results_queue"):
        raise RuntimeError("filesystem_async._results_queue does not exist: update mcore_fixes.py")
    filesystem_async._results_queue = queue.SimpleQueue()


_held: list[Exception] = []


def hold_file_errors() -> None:
    """Keeps rank 0 in a save when the disk fails, so that the other ranks do not wait for it.

    megatron-core lets rank 0 write three small files by itself (common.pt, .metadata, metadata.json)
    between collectives; an error there leaves the other ranks waiting for rank 0. Here the error is
    kept until all ranks can be told (`take_held_error`).
    Test: tests/train/checkpoint/test_failed_saves.py.
    """
    for owner, name in (
        (TorchCommonSaveStrategy, "save_common"),
        (filesystem_async.FileSystemWriterAsync, "finish"),
        (serialization, "save_config"),
    ):
        original = getattr(owner, name)
        if getattr(original, "__name__", "") != "holding":
            setattr(owner, name, _holding(original))


def _holding(original: Callable[..., None]) -> Callable[..., None]:
    def holding(*args: Any, **kwargs: Any) -> None:
        try:
            original(*args, **kwargs)
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            _held.append(error)

    return holding


def take_held_error() -> Exception | None:
    """Returns the first error that was held since the last call, or None."""
    first = _held[0] if _held else None
    _held.clear()
    return first
