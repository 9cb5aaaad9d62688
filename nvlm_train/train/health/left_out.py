"""Reads and writes RUN_DIR/left_out_steps.json: steps that are passed over because of a loss spike.

The data position remains one integer: the batch of step n does not change, and the steps in the list
are passed over. A resumed run reads the same list.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

FILE_NAME = "left_out_steps.json"


@dataclass(frozen=True)
class LeftOut:
    """Names the steps `first` to `last` of a stage, both included, counted from 1 as in metrics.jsonl."""

    stage: str
    first: int
    last: int
    reason: str


def read_left_out(run_dir: Path) -> list[LeftOut]:
    """Returns the run's list, oldest entry first."""
    path = run_dir / FILE_NAME
    if not path.exists():
        return []
    return [LeftOut(**each) for each in json.loads(path.read_text())]


def append_left_out(run_dir: Path, entry: LeftOut) -> None:
    """Adds an entry. The file is replaced as a whole, so a reader never sees half of it."""
    entries = [asdict(each) for each in (*read_left_out(run_dir), entry)]
    partial = (run_dir / FILE_NAME).with_suffix(".partial")
    with partial.open("w") as file:
        file.write(json.dumps(entries, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, run_dir / FILE_NAME)


def indices(entries: list[LeftOut], stage: str) -> frozenset[int]:
    """Returns the steps that one stage leaves out, counted from 0 as in the data plan."""
    return frozenset(
        step
        for entry in entries
        if entry.stage == stage
        for step in range(entry.first - 1, entry.last)
    )


def around(spike_step: int, reach: int, saved_step: int, num_steps: int) -> tuple[int, int] | None:
    """Returns the first and last step to leave out after a spike, counted from 1; None for the last step.

    Steps that the newest checkpoint was trained on stay. The stage's last step stays too, because it
    ends the stage with a save, and a spike there has no step after it to protect.

    Args:
        spike_step: the step with the spike.
        reach: steps to leave out before and after it.
        saved_step: the step of the newest checkpoint.
        num_steps: steps of the stage.
    """
    first, last = max(spike_step - reach, saved_step + 1), min(spike_step + reach, num_steps - 1)
    return (first, last) if first <= spike_step <= last else None
