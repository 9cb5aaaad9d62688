"""SIGTERM to real processes under torchrun; chaos.py tests kill -9."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from nvlm_train.train.checkpoint.directory import complete_checkpoints
from nvlm_train.train.signals import EXIT_REQUEUE
from tests.train.layouts import layout
from tests.train.smoke import overrides, read_metrics

pytestmark = pytest.mark.slow

STEPS = 8
"""Of each stage; with a checkpoint every third."""
PATIENCE_S = 300

Launch = Callable[[Path], subprocess.Popen]


@pytest.fixture
def launch(data: Path, tmp_path: Path) -> Iterator[Launch]:
    """Returns `launch(run_dir)`, which starts TP2 x PP2 under torchrun in a process group of its own."""
    _, parallel = layout("TP2 PP2")
    own = [
        f"stages.pretrain.steps={STEPS}", f"stages.sft.steps={STEPS}", "checkpoint.interval_steps=3"
    ]  # fmt: skip
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    started: list[subprocess.Popen] = []

    def start(run_dir: Path) -> subprocess.Popen:
        command = [sys.executable, *torchrun, "-m", "nvlm_train", "train"]
        with (tmp_path / f"{run_dir.name}.log").open("a") as log:
            process = subprocess.Popen(
                [*command, *overrides(data, run_dir, *parallel, *own)],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            _kill_all(process)


def _kill_all(process: subprocess.Popen) -> None:
    """Kills torchrun and all processes below it. Its workers lead process groups of their own."""
    family = psutil.Process(process.pid).children(recursive=True)
    for each in (psutil.Process(process.pid), *family):
        try:
            each.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()


def _wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode} before it could be stopped"
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)


def _records(run_dir: Path) -> list[dict]:
    return read_metrics(run_dir) if (run_dir / "metrics.jsonl").exists() else []


def test_sigterm_to_one_worker_saves_and_says_so(launch: Launch, tmp_path: Path) -> None:
    """Workers exit with EXIT_REQUEUE (75); torchrun reports that code and fails with one of its own."""
    run_dir = tmp_path / "run"
    process = launch(run_dir)
    _wait_for(lambda: len(_records(run_dir)) >= 2, process)
    ranks = {
        int(child.environ()["RANK"]): child
        for child in psutil.Process(process.pid).children()
        if "RANK" in child.environ()
    }
    ranks[2].send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_S) != 0
    log = (tmp_path / "run.log").read_text()
    assert f"exitcode  : {EXIT_REQUEUE}" in log
    assert "stopped by a signal and saved; the same command goes on" in log
    done = _records(run_dir)[-1]["global_step"]
    assert done < 2 * STEPS
    newest = complete_checkpoints(run_dir)[-1]
    assert newest.name == (f"pretrain-{done:08d}" if done <= STEPS else f"sft-{done - STEPS:08d}")
    assert launch(run_dir).wait(PATIENCE_S) == 0
    assert [record["global_step"] for record in _records(run_dir)] == list(range(1, 2 * STEPS + 1))
