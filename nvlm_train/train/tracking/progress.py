"""Shows steps to a person: as a live line on a terminal, as plain lines in a log."""

from __future__ import annotations

import logging
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from nvlm_train.train.part_timer import PARTS
from nvlm_train.train.tracking.metrics_log import Record

logger = logging.getLogger(__name__)


class StepView(Protocol):
    """Shows steps as they come."""

    def show(self, record: Record) -> None:
        """Shows one step."""

    def close(self) -> None:
        """Leaves the terminal as it was."""


def open_view(total_steps: int, steps_done: int, every: int) -> StepView:
    """Returns a live line when stderr is a terminal, plain log lines otherwise.

    Args:
        total_steps: steps of the whole schedule.
        steps_done: steps that the run has done already.
        every: interval of plain lines, in steps.
    """
    console = Console(stderr=True)
    if console.is_terminal:
        return _LiveLine(console, total_steps, steps_done)
    return _PlainLines(total_steps, every)


def summary(record: Record) -> str:
    """Returns the most important numbers of a step in one short line.

    >>> summary({"stage": "sft", "step": 3, "loss": 2.5, "lr": 1e-4})
    'sft step 3 loss 2.5000 lr 1.00e-04'
    """
    shapes = {
        "loss": "loss {:.4f}",
        "grad_norm": "grad {:.3f}",
        "lr": "lr {:.2e}",
        "tokens_per_second": "{:,.0f} tokens/s",
        "tflops_per_rank": "{:.3g} TFLOP/s",
        "mfu": "MFU {:.1%}",
    }
    words = [shape.format(float(record[key])) for key, shape in shapes.items() if key in record]
    words += _shares(record)
    if record.get("skipped_samples"):
        words.append(f"skipped {record['skipped_samples']}")
    return " ".join([f"{record.get('stage', '')} step {record.get('step', '')}", *words])


def _shares(record: Record) -> list[str]:
    """Says what the step's time went to, in percent of it; parts below half a percent are left out.

    >>> _shares({"seconds/encode": 1.0, "seconds/layers": 2.0, "seconds/output": 0, "seconds/waiting": 1.0})
    ['(encode 25% layers 50% waiting 25%)']
    """
    seconds = {part: float(record.get(f"seconds/{part}", 0.0)) for part in PARTS}
    total = sum(seconds.values())
    shares = {part: own / total for part, own in seconds.items() if total and own / total >= 0.005}
    words = " ".join(f"{part} {share:.0%}" for part, share in shares.items())
    return [f"({words})"] if words else []


class _PlainLines:
    def __init__(self, total_steps: int, every: int) -> None:
        self._total, self._every = total_steps, every

    def show(self, record: Record) -> None:
        done = int(record["global_step"])
        if done % self._every == 0 or done == self._total:
            logger.info("%s (%d/%d)", summary(record), done, self._total)

    def close(self) -> None:
        return


class _LiveLine:
    def __init__(self, console: Console, total_steps: int, steps_done: int) -> None:
        columns = (BarColumn(bar_width=20), TextColumn("{task.completed}/{task.total}"))
        self._progress = Progress(
            *columns, TextColumn("{task.description}"), TimeRemainingColumn(), console=console
        )
        self._task: TaskID = self._progress.add_task("", total=total_steps, completed=steps_done)
        self._progress.start()

    def show(self, record: Record) -> None:
        done = int(record["global_step"])
        self._progress.update(self._task, completed=done, description=summary(record))

    def close(self) -> None:
        self._progress.stop()
