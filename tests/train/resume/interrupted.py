"""A run that is stopped and started again equals the run that was not stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from nvlm_train.train.signals import EXIT_REQUEUE
from tests.train import runs
from tests.train.layouts import layout
from tests.train.smoke import read_metrics
from tests.workers import WorkerPool

WholeRun = Callable[..., Path]


def stop(data: Path, run_dir: Path, stop_after: int, overrides: list[str]) -> int:
    """Runs on the workers: `runs.run` up to a SIGTERM."""
    return runs.run(data, run_dir, *overrides, stop_after=stop_after)


def assert_continues_bit_for_bit(
    workers: WorkerPool,
    data: Path,
    stopped: Path,
    whole_run: WholeRun,
    name: str,
    stop_after: int,
    *more: str,
) -> dict[str, torch.Tensor]:
    """Stops a run in the directory `stopped`, goes on in the same layout, compares; the final weights."""
    world, parallel = layout(name)
    overrides = [*parallel, *more]
    codes = workers.run(world, stop, data, stopped, stop_after, overrides)
    assert codes == [EXIT_REQUEUE] * world
    assert len(read_metrics(stopped)) == stop_after
    assert workers.run(world, runs.run, data, stopped, *overrides) == [0] * world
    whole = whole_run(name, *more)
    assert read_metrics(stopped) == read_metrics(whole)
    expected, continued = (
        workers.run(1, runs.final_weights, data, run, *more)[0] for run in (whole, stopped)
    )
    assert all(torch.equal(expected[key], continued[key]) for key in expected)
    return expected
