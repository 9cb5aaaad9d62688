"""Seconds this process has spent waiting for other ranks, as far as its host can know.

On gloo every collective and every pipeline transfer blocks in `Work.wait`, so the figure is complete
(parallel/cpu.py puts `timed_wait` there). NCCL's `wait` only orders streams: there the figure has what
is marked with `waiting()`, the agreement at the start of a step, where ranks wait for each other's data.
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
    """Seconds since the process started."""
    return _seconds


@contextmanager
def waiting() -> Iterator[None]:
    """Counts the time inside; nested ones count once."""
    global _seconds, _depth  # noqa: PLW0603
    began, _depth = time.perf_counter(), _depth + 1
    try:
        yield
    finally:
        _depth -= 1
        if _depth == 0:
            _seconds += time.perf_counter() - began


def timed_wait(work: dist.Work, *args: Any, **kwargs: Any) -> Any:
    """`torch.distributed.Work.wait`, counted."""
    with waiting():
        return _wait(work, *args, **kwargs)
