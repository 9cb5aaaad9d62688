"""Measures the seconds that this process waits for other ranks, as far as its host can know.

With gloo every collective and every pipeline transfer blocks in `Work.wait`, so the figure is complete
(parallel/cpu.py puts `timed_wait` there). NCCL's `wait` only orders streams, so with NCCL the figure has
only the blocks marked with `waiting()`: the agreement at the start of a step, where ranks wait for each
other's data.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

_wait = dist.Work.wait
_seconds = 0.0
_depth = 0


def waited() -> float:
    """Returns the seconds that this process has waited since it started."""
    return _seconds


@contextmanager
def waiting() -> Iterator[None]:
    """Counts the time of the block as waiting; nested blocks count once."""
    global _seconds, _depth  # noqa: PLW0603
    began, _depth = time.perf_counter(), _depth + 1
    try:
        yield
    finally:
        _depth -= 1
        if _depth == 0:
            _seconds += time.perf_counter() - began


def timed_wait(work: dist.Work, *args: Any, **kwargs: Any) -> Any:
    """Calls `torch.distributed.Work.wait` and counts its time."""
    with waiting():
        return _wait(work, *args, **kwargs)
