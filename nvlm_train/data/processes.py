"""Worker processes of the data commands."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from nvlm_train.errors import ShardError


@contextmanager
def processes(
    count: int, start: Callable[..., None], *arguments: object
) -> Iterator[ProcessPoolExecutor]:
    """Opens fresh processes that each call `start(*arguments)` first; forks would copy held locks.

    Raises:
        ShardError: a process was killed.
    """
    context = multiprocessing.get_context("spawn")
    with (
        killed_workers_explained(),
        ProcessPoolExecutor(count, context, start, arguments) as pool,
    ):
        yield pool


@contextmanager
def killed_workers_explained() -> Iterator[None]:
    """Raises ShardError, with the remedy, where a pool lost a process."""
    try:
        yield
    except BrokenProcessPool as error:
        raise ShardError(
            f"a worker was killed ({error}), perhaps for lack of memory; run the same command "
            "again, with fewer --workers"
        ) from error
