"""Saves fail on a full disk or in a writer. Every rank learns of it, and the run ends as the recipe says."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nvlm_train.errors import TrainingError
from nvlm_train.train.tracking.metrics_log import MetricsLog
from tests.train import runs
from tests.train.checkpoint import saves
from tests.train.layouts import layout
from tests.train.smoke import read_metrics
from tests.workers import WorkerPool

WholeRun = Callable[..., Path]
KIB = 1024
KEEP = "checkpoint.keep_last=9"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Returns `small_disk(size)`, a directory on a file system of `size` KiB. Later calls resize it."""
    if os.geteuid():
        pytest.skip("needs root to mount a tmpfs")
    place, options = tmp_path / "disk", ""
    place.mkdir()

    def mount(size: int) -> Path:
        nonlocal options
        command = ["mount", "-t", "tmpfs", "-o", f"{options}size={size}k", "tmpfs", str(place)]
        done = subprocess.run(command, check=False, capture_output=True)
        if done.returncode:
            pytest.skip(f"cannot mount a tmpfs here: {done.stderr.decode().strip()}")
        options = "remount,"
        return place

    yield mount
    if options:
        subprocess.run(["umount", str(place)], check=True)


def checkpoint_size(checkpoint: Path) -> int:
    """Returns the KiB that a checkpoint takes on a file system with pages of 4 KiB."""
    return sum(-(-path.stat().st_size // 4096) * 4 for path in checkpoint.iterdir())


@pytest.mark.slow
def test_full_disk_at_every_point_of_a_save(
    workers: WorkerPool, data: Path, whole_run: WholeRun, small_disk: Callable[[int], Path]
) -> None:
    """The disk is full from the first file that rank 0 writes alone to the manifest; then there is room."""
    world, parallel = layout("DP2")
    size = checkpoint_size(whole_run("DP2", KEEP) / "checkpoints" / "pretrain-00000002")
    run_dir = small_disk(4 * size)
    rooms = [0, 4, 8, size // 2, size - 16, size - 8, size - 4, 2 * size]
    answers = workers.run(
        world, saves.save_with_room_for, data, run_dir, [KIB * room for room in rooms], *parallel
    )
    assert answers[0] == answers[1]
    *failed, good = answers[0]
    for step, (message, names) in enumerate(failed, 1):
        assert f"checkpoint pretrain-{step:08d} was not saved" in message, (
            rooms[step - 1],
            message,
        )
        assert "No space left on device" in message
        assert "failed saves in a row: " in message and "start the same command again" in message
        assert names == []
    assert good == ("", [f"pretrain-{len(rooms):08d}"])


@pytest.mark.slow
def test_full_disk_stops_the_run_and_it_goes_on_when_there_is_room(
    workers: WorkerPool, data: Path, whole_run: WholeRun, small_disk: Callable[[int], Path]
) -> None:
    world, parallel = layout("DP2")
    size = checkpoint_size(whole_run("DP2", KEEP) / "checkpoints" / "pretrain-00000002")
    run_dir = small_disk(size * 3 // 2)
    for message, _ in workers.run(world, saves.run_and_listen, data, run_dir, *parallel):
        assert "checkpoint pretrain-00000004 was not saved" in str(message)
        assert "GiB free of" in str(message)
        assert "the newest complete one is pretrain-00000002" in str(message)
    small_disk(size * 10)
    assert workers.run(world, runs.run, data, run_dir, *parallel) == [0] * world
    assert read_metrics(run_dir) == read_metrics(whole_run("DP2", KEEP))


@pytest.mark.slow
def test_recipe_may_tolerate_failed_saves_but_not_at_a_stage_end(
    workers: WorkerPool, data: Path, whole_run: WholeRun, small_disk: Callable[[int], Path]
) -> None:
    world, parallel = layout("DP2")
    size = checkpoint_size(whole_run("DP2", KEEP) / "checkpoints" / "pretrain-00000002")
    run_dir = small_disk(size // 2)
    tolerant = ["checkpoint.interval_steps=1", "checkpoint.max_failed_saves=9"]
    answers = workers.run(world, saves.run_and_listen, data, run_dir, *parallel, *tolerant)
    for rank, (end, heard) in enumerate(answers):
        assert "checkpoint pretrain-00000004 was not saved" in str(end)
        assert rank == 0 or heard == []
        assert rank > 0 or [line.split(" was not saved")[0] for line in heard] == [
            f"checkpoint pretrain-{step:08d}" for step in (1, 2, 3, 4)
        ]
        assert all("No space left on device" in line for line in heard)
    assert len(read_metrics(run_dir)) == 4


def test_metrics_on_a_full_disk(small_disk: Callable[[int], Path]) -> None:
    """There is one message. With room again the torn line is gone, and no step before it is missing."""
    run_dir = small_disk(64)
    log, step = MetricsLog(run_dir, 0), 0
    with pytest.raises(
        TrainingError, match="No space left on device.*start the same command again"
    ):
        for step in range(1, 1000):
            log.append({"global_step": step, "padding": "x" * 300})
    log.close()
    small_disk(1024)
    path = run_dir / "metrics.jsonl"
    assert not path.read_bytes().endswith(b"\n")
    MetricsLog(run_dir, 1000).close()
    assert path.read_bytes().endswith(b"\n")
    assert [each["global_step"] for each in read_metrics(run_dir)] == list(range(1, step))


def test_error_of_one_writer_is_a_failed_save_of_all(
    workers: WorkerPool, data: Path, tmp_path: Path
) -> None:
    for first, second in workers.run(2, saves.save_with_a_broken_file, data, tmp_path):
        assert "rank 1: " in first and "Input/output error" in first and "rank 0: " not in first
        assert second == ""


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_may_go_on_at_once(
    workers: WorkerPool, data: Path, tmp_path: Path, precision: str
) -> None:
    """Writers have copies of their own. No process is forked, which would copy locks that nobody opens."""
    world, parallel = layout("DP2")
    overrides = [*parallel, f"precision={precision}"]
    answers = workers.run(world, saves.save_while_training_goes_on, data, tmp_path, *overrides)
    assert answers == [(0, True)] * world


def test_a_saver_keeps_no_engine(workers: WorkerPool, data: Path, tmp_path: Path) -> None:
    """The next stage's would be built beside it."""
    assert all(workers.run(2, saves.leaves_the_engine, data, tmp_path / "run"))
