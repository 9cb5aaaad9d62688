"""Writes metrics.jsonl, one JSON object per step. It survives crashes, and a resume repeats no step."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from nvlm_train.errors import TrainingError

Record = Mapping[str, float | int | str]
"""What a step reports. It has `stage`, `step` (in the stage) and `global_step` (steps done in the run)."""

FILE_NAME = "metrics.jsonl"


class MetricsLog:
    """Appends to a run's metrics.jsonl. Only one process of a run opens it.

    Args:
        run_dir: is made when it is not there.
        steps_done: steps of the whole run that the checkpoint holds. Records of later steps were
            written after the last save of an interrupted run. They are dropped, because those steps
            are trained again.
    """

    def __init__(self, run_dir: str | Path, steps_done: int) -> None:
        self.path = Path(run_dir) / FILE_NAME
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _keep_until(self.path, steps_done)
        # Unbuffered: a line is one system call, and nothing is left to fail again when the file is closed.
        self._file = self.path.open("ab", buffering=0)

    def append(self, record: Record) -> None:
        """Writes one line. The operating system has it at once, so a killed process loses none.

        Raises:
            TrainingError: the disk is full, or the file system went read-only.
        """
        line = memoryview(json.dumps(dict(record)).encode() + b"\n")
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise TrainingError(
                f"{self.path} cannot be written: {error}; make room or repair the disk, then start the same "
                "command again: it goes on from the last checkpoint"
            ) from error

    def rewind(self, steps_done: int) -> None:
        """Drops the records of steps after `steps_done`, because the run goes back to a checkpoint."""
        self._file.close()
        _keep_until(self.path, steps_done)
        self._file = self.path.open("ab", buffering=0)

    def close(self) -> None:
        """Closes the file. A second call does nothing."""
        self._file.close()


def read_metrics(path: str | Path) -> Iterator[dict[str, float | int | str]]:
    """Yields the records of a metrics.jsonl, oldest first, up to a line that a crash cut short."""
    with Path(path).open("rb") as file:
        for line in file:
            record = _parse(line)
            if record is None:
                return
            yield record


def _parse(line: bytes) -> dict[str, float | int | str] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _keep_until(path: Path, steps_done: int) -> None:
    """Drops records after `steps_done`. The new file replaces the old one as a whole."""
    if not path.exists():
        return
    kept = [each for each in read_metrics(path) if int(each.get("global_step", 0)) <= steps_done]
    content = "".join(json.dumps(each) + "\n" for each in kept)
    if content.encode() == path.read_bytes():
        return
    partial = path.with_suffix(".jsonl.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
