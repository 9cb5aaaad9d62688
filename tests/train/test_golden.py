"""Compares losses and gradient norms of the smoke recipe with stored ones. A change needs an explanation.

`python -m tests.train.test_golden` writes tests/train/golden/smoke.json anew.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.train.layouts import NO_DROPOUT
from tests.train.smoke import make_smoke_data, read_metrics
from tests.workers import WorkerPool

GOLDEN = Path(__file__).parent / "golden" / "smoke.json"
FIELDS = ("loss", "grad_norm")


def numbers(run_dir: Path) -> dict[str, list[float]]:
    """Returns what is compared, by field."""
    records = read_metrics(run_dir)
    return {field: [record[field] for record in records] for field in FIELDS}


def test_losses_are_what_they_were(whole_run: Callable[..., Path]) -> None:
    golden = json.loads(GOLDEN.read_text())
    found = numbers(whole_run("single", *NO_DROPOUT))
    for field in FIELDS:
        assert len(golden[field]) == 8
        assert found[field] == pytest.approx(golden[field], rel=1e-4), field


def write_golden() -> None:
    """Runs the recipe on one worker and stores its numbers."""
    from tests.train import runs

    with tempfile.TemporaryDirectory() as directory:
        data, run_dir = Path(directory) / "data", Path(directory) / "run"
        make_smoke_data(data)
        workers = WorkerPool(1)
        workers.run(1, runs.run, data, run_dir, *NO_DROPOUT)
        workers.close()
        GOLDEN.write_text(json.dumps(numbers(run_dir), indent=1) + "\n")


if __name__ == "__main__":
    write_golden()
