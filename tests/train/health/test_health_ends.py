"""Real processes under torchrun, one of which hangs, crashes or runs out of memory: how the run ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from nvlm_train.train.health.ending import EXIT_HANG
from tests.train.layouts import layout
from tests.train.smoke import overrides

pytestmark = pytest.mark.slow
PATIENCE_S = 300
WATCHED = ("health.hang_floor_seconds=15", "health.hang_factor=3", "health.hang_grace_seconds=200")
STEPS = ("schedule=[sft]", "stages.sft.steps=200", "checkpoint.interval_steps=2")


@dataclass(frozen=True)
class Ended:
    code: int
    log: str
    seconds: float
    run_dir: Path


def run_until_it_ends(
    kind: str, data: Path, tmp_path: Path, name: str, rank: int, step: int, *more: str
) -> Ended:
    """Runs a real world, of which one rank fails at a step."""
    world, parallel = layout(name)
    run_dir = tmp_path / "run"
    own = overrides(data, run_dir, *parallel, *STEPS, *WATCHED, *more)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    command = [sys.executable, *(launch if world > 1 else []), "-m", "tests.train.health.faulty"]
    began = time.monotonic()
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, kind, str(rank), str(step), *own],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            code = process.wait(PATIENCE_S)
            left = [each for each in psutil.process_iter() if _belongs_to(each, run_dir)]
        finally:
            for each in psutil.process_iter():
                if _belongs_to(each, run_dir):
                    each.send_signal(signal.SIGKILL)
    assert not left, "processes were left behind"
    return Ended(code, (tmp_path / "log").read_text(), time.monotonic() - began, run_dir)


def _belongs_to(process: psutil.Process, run_dir: Path) -> bool:
    try:
        return f"run_dir={run_dir}" in process.cmdline()
    except psutil.NoSuchProcess:
        return False


def test_sleeping_rank_is_found_and_named(data: Path, tmp_path: Path) -> None:
    ended = run_until_it_ends("sleep", data, tmp_path, "TP2 PP2", 2, 5)
    assert ended.code != 0
    assert f"exitcode  : {EXIT_HANG}" in ended.log
    assert "hang: no progress for" in ended.log
    assert "rank 2 on" in ended.log and "is the one to look at: it is in" in ended.log
    assert "tests/train/health/faulty.py" in ended.log
    assert "stacks of 4 of 4 ranks" in ended.log
    (directory,) = (ended.run_dir / "health").glob("hang-sft-00000004-*")
    stacks = [(directory / f"rank-{rank:05d}.txt").read_text() for rank in range(4)]
    assert "faulty.py" in stacks[2]
    assert all("run_step" in each for each in stacks)
    reports = [json.loads((directory / f"rank-{rank:05d}.json").read_text()) for rank in range(4)]
    assert [each["waits_in"] is None for each in reports] == [False, False, True, False]
    assert json.loads((ended.run_dir / "heartbeat.json").read_text())["step"] == 4


def test_frozen_rank_is_ended_by_the_timer_in_c(data: Path, tmp_path: Path) -> None:
    """It can run no Python: the others write their stacks without it, and its own stack comes from C."""
    ended = run_until_it_ends("freeze", data, tmp_path, "TP2", 1, 5)
    assert ended.code != 0
    assert f"exitcode  : {EXIT_HANG}" in ended.log
    assert "ranks 1 could run no Python, or are dead (stacks from C: frozen-rank-00001" in ended.log
    frozen = (ended.run_dir / "health" / "frozen-rank-00001.txt").read_text()
    assert "in _freeze" in frozen and "in run_step" in frozen
    (directory,) = (ended.run_dir / "health").glob("hang-sft-00000004-*")
    assert (directory / "rank-00000.txt").exists()


def test_one_rank_with_a_bug_ends_all(data: Path, tmp_path: Path) -> None:
    ended = run_until_it_ends("raise", data, tmp_path, "TP2 PP2", 3, 3)
    assert ended.code != 0
    assert "an unexpected error ends this rank" in ended.log and "a bug of ours" in ended.log
    root_cause = ended.log[ended.log.index("Root Cause") :]
    assert "rank      : 3" in root_cause and "KeyError: 'a bug of ours'" in root_cause


def test_crash_in_c_shows_python_stacks(data: Path, tmp_path: Path) -> None:
    ended = run_until_it_ends("segv", data, tmp_path, "single", 0, 2)
    assert ended.code == -signal.SIGSEGV
    assert "Fatal Python error: Segmentation fault" in ended.log and "run_step" in ended.log


def test_out_of_memory_says_what_to_change(data: Path, tmp_path: Path) -> None:
    """The limit on the address space is real, and torch refuses the allocation."""
    ended = run_until_it_ends("memory", data, tmp_path, "single", 0, 3)
    assert ended.code == 2
    assert "out of memory in stage sft" in ended.log
    assert json.loads((ended.run_dir / "heartbeat.json").read_text())["doing"] == "failed"
    for key in ("sequence_length=128", "max_tiles_in_flight=256", "recompute=none", "tensor=1"):
        assert f"stages.sft.{key}" in ended.log or f"stages.sft.parallel.{key}" in ended.log


def test_long_first_steps_and_saves_are_no_hang(data: Path, tmp_path: Path) -> None:
    """The floor is far below what starting takes. A run that is merely slow at first ends well."""
    ended = run_until_it_ends("none", data, tmp_path, "single", 0, 0, "stages.sft.steps=6")
    assert ended.code == 0, ended.log
    assert json.loads((ended.run_dir / "heartbeat.json").read_text())["doing"] == "ended"
    assert not list((ended.run_dir / "health").iterdir())
