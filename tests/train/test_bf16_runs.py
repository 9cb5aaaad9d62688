"""Whole runs in bf16: fp32 copies of the weights in the optimizer, saved, resharded, resumed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train import runs
from tests.train.layouts import NO_DROPOUT, layout
from tests.train.resume.interrupted import WholeRun, assert_continues_bit_for_bit, stop
from tests.train.smoke import read_metrics
from tests.workers import WorkerPool

BF16 = "precision=bf16"
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("name", "stop_after"), [("TP2 PP2", 4), ("DP2", 6)])
def test_stopped_run_continues_bit_for_bit(
    workers: WorkerPool, data: Path, tmp_path: Path, whole_run: WholeRun, name: str, stop_after: int
) -> None:
    """Step 4 is the hand-over between the stages."""
    assert_continues_bit_for_bit(workers, data, tmp_path, whole_run, name, stop_after, BF16)


def test_resume_in_another_layout(
    workers: WorkerPool, data: Path, tmp_path: Path, whole_run: WholeRun
) -> None:
    moved = tmp_path / "moved"
    world, overrides = layout("PP2 DP2")
    workers.run(world, stop, data, moved, 6, [*overrides, *NO_DROPOUT, BF16])
    world, overrides = layout("TP2")
    assert workers.run(world, runs.run, data, moved, *overrides, *NO_DROPOUT, BF16) == [0, 0]
    expected, found = (read_metrics(run) for run in (whole_run("single", *NO_DROPOUT), moved))
    for key, tolerance in (("samples_hash", 0.0), ("loss", 2e-3), ("grad_norm", 5e-2)):
        each = [[step[key] for step in run] for run in (found, expected)]
        assert each[0] == (pytest.approx(each[1], rel=tolerance) if tolerance else each[1])
