"""What a person sees of a preparation: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nvlm_train.data.prepare.preparation import PrepareProgress

LINE_SECONDS = 10.0
"""Plain lines come at most this often."""

_log = logging.getLogger(__name__)


class PrepareView(Protocol):
    """Shows progress as it comes."""

    def show(self, progress: PrepareProgress) -> None:
        """Shows how far the preparation is."""


@contextmanager
def open_view(name: str) -> Iterator[PrepareView]:
    """Opens a bar when stderr is a terminal, plain lines otherwise."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _PlainLines(name)
        return
    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TextColumn("entries"))
    with Progress(
        *columns, TextColumn("{task.description}"), TimeRemainingColumn(), console=console
    ) as bar:
        yield _Bar(bar)


def summary(progress: PrepareProgress) -> str:
    """Returns shards, bytes and bad entries in one short line.

    >>> summary(PrepareProgress(9, 4, 5, 2, 2_500_000, 0))
    '2/5 shards, 2.5 MB'
    """
    bad = f", {progress.num_bad} bad" if progress.num_bad else ""
    size = progress.num_bytes / 1e6
    return f"{progress.shards_done}/{progress.num_shards} shards, {size:,.1f} MB{bad}"


class _Bar:
    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=None)

    def show(self, progress: PrepareProgress) -> None:
        self._bar.update(
            self._task,
            total=progress.num_entries,
            completed=progress.num_done,
            description=summary(progress),
        )


class _PlainLines:
    def __init__(self, name: str) -> None:
        self._name = name
        self._next = 0.0

    def show(self, progress: PrepareProgress) -> None:
        now = time.monotonic()
        if now >= self._next or progress.num_done == progress.num_entries:
            self._next = now + LINE_SECONDS
            _log.info(
                "%s: %d/%d entries, %s",
                self._name,
                progress.num_done,
                progress.num_entries,
                summary(progress),
            )
