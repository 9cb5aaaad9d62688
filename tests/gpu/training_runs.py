"""Runs on the workers: whole runs of the smoke recipe on a kernel path, stopped, killed and started again.

`python -m tests.gpu.training_runs DATA RUN_DIR PATH STEPS OVERRIDES...` kills itself after some steps.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

from nvlm_train.train.checkpoint import sharded_state
from nvlm_train.train.loop import train
from nvlm_train.train.tracking.tracker import Tracker
from tests.gpu import paths
from tests.train import runs
from tests.train.smoke import smoke_recipe

PATHS = {"CPU": paths.CPU, "CPU bf16": paths.CPU_BF16} | paths.GPU
SIZES = (
    # As in the other tests of this folder, so that a GPU's encoder is compiled once.
    "model.vision.batch_tiles=4",
    "model.language.head_dim=64",
    # A save waits for the one before it: after the third step the first one's is complete.
    "checkpoint.interval_steps=1",
)


def overrides_of(path: str, *more: str) -> list[str]:
    """Returns what a run on a path changes in the smoke recipe."""
    return [f"precision={PATHS[path].precision}", *SIZES, *more]


def run(
    data: Path, run_dir: Path, path: str, more: list[str], stop_after: int | None = None
) -> int:
    """Trains both stages, or until a SIGTERM after `stop_after` steps. Returns the exit code."""
    with PATHS[path].chosen():
        return runs.run(data, run_dir, *overrides_of(path, *more), stop_after=stop_after)


def run_without_generators(data: Path, run_dir: Path, path: str, more: list[str]) -> int:
    """Deliberate bug: a checkpoint's states of the generators are not restored."""
    with mock.patch.object(sharded_state, "_restore_rng", lambda states: None):
        return run(data, run_dir, path, more)


def kill(data: Path, run_dir: Path, path: str, steps: int, more: list[str]) -> int:
    """Trains in a process of its own, which kills itself (SIGKILL) once it has logged `steps` steps.

    Returns:
        Its exit code.
    """
    hidden = {} if path in paths.GPU else {"CUDA_VISIBLE_DEVICES": ""}
    arguments = [str(data), str(run_dir), path, str(steps), *more]
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.training_runs", *arguments],
        env={**os.environ, **hidden, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    return done.returncode


def _be_killed(data: Path, run_dir: Path, path: str, steps: int, more: list[str]) -> None:
    original = Tracker.log

    def log(self: Tracker, record: dict) -> None:
        original(self, record)
        if record["global_step"] == steps:
            os.kill(os.getpid(), signal.SIGKILL)

    with PATHS[path].chosen(), mock.patch.object(Tracker, "log", log):
        train(smoke_recipe(data, run_dir, *overrides_of(path, *more)))


if __name__ == "__main__":
    _be_killed(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), sys.argv[5:])
