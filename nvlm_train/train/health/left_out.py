"""RUN_DIR/left_out_steps.json: steps that the run goes without, because a loss spike lay among them.

With it the data position is one integer still: step n's batch is what it always was, and the steps in
the list are passed over. A resumed run reads the same list.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

FILE_NAME = "left_out_steps.json"


@dataclass(frozen=True)
class LeftOut:
    """Steps first to last of a stage, counted from 1 as in metrics.jsonl, both included."""

    stage: str
    first: int
    last: int
    reason: str


def read_left_out(run_dir: Path) -> list[LeftOut]:
    """The run's list, oldest first."""
    path = run_dir / FILE_NAME
    if not path.exists():
        return []
    return [LeftOut(**each) for each in json.loads(path.read_text())]


def append_left_out(run_dir: Path, entry: LeftOut) -> None:
    """Adds an entry; the file is whole at every moment."""
    entries = [asdict(each) for each in (*read_left_out(run_dir), entry)]
    partial = (run_dir / FILE_NAME).with_suffix(".partial")
    with partial.open("w") as file:
        file.write(json.dumps(entries, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, run_dir / FILE_NAME)


def indices(entries: list[LeftOut], stage: str) -> frozenset[int]:
    """Of one stage, counted from 0 as the data plan does."""
    return frozenset(
        step
        for entry in entries
        if entry.stage == stage
        for step in range(entry.first - 1, entry.last)
    )


def around(spike_step: int, reach: int, saved_step: int, num_steps: int) -> tuple[int, int] | None:
    """First and last step to leave out after a spike at `spike_step`, counted from 1.

    What the newest checkpoint, at `saved_step`, has been trained on stays. The stage's last step stays
    too, as it ends the stage with a save; a spike there has nothing after it to protect.
    """
    first, last = max(spike_step - reach, saved_step + 1), min(spike_step + reach, num_steps - 1)
    return (first, last) if first <= spike_step <= last else None
