"""Two runs in one directory, with real processes, one of them killed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing as mp
import os
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Barrier
from multiprocessing.synchronize import Event as EventType
from pathlib import Path

import pytest

from nvlm_train.errors import RunLockedError
from nvlm_train.train import run_lock
from nvlm_train.train.run_lock import FILE_NAME, Owner, RunLock, why_alive
from tests.workers import WorkerPool

Start = Callable[..., BaseProcess]
ME = Owner.here()
FORK = mp.get_context("fork")


@pytest.fixture
def start() -> Iterator[Start]:
    """Returns `start(function, *args)`, which runs a function in a process and waits until it is ready."""
    started = []

    def begin(function: Callable[..., None], *args: object) -> BaseProcess:
        ours, theirs = FORK.Pipe()
        process = FORK.Process(target=function, args=(theirs, *args))
        process.start()
        started.append(process)
        assert ours.poll(30), "the process did not get ready"
        assert ours.recv() == "ready"
        return process

    yield begin
    for process in started:
        process.kill()
        process.join()


def _hold(connection, run_dir: Path) -> None:
    RunLock(run_dir, Owner.here(), patience_s=0)
    connection.send("ready")
    time.sleep(60)


def _hold_with_child(connection, run_dir: Path, go_on: EventType) -> None:
    """Makes an owner that leaves a process which holds its files until it may go on."""
    RunLock(run_dir, Owner.here(), patience_s=0)
    if os.fork() == 0:
        go_on.wait(60)
        os._exit(0)
    connection.send("ready")
    time.sleep(60)


def take(run_dir: Path, me: Owner = ME, patience_s: float = 0) -> RunLock:
    return RunLock(run_dir, me, patience_s)


def leave_behind(run_dir: Path, owner: Owner) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / FILE_NAME).write_text(json.dumps(dataclasses.asdict(owner)))


def test_a_living_owner_is_named_with_the_remedy(start: Start, tmp_path: Path) -> None:
    process = start(_hold, tmp_path)
    with pytest.raises(RunLockedError) as caught:
        take(tmp_path)
    message = str(caught.value)
    assert f"process {process.pid} on {ME.host}" in message and "started 20" in message
    assert f"remove {tmp_path / FILE_NAME}" in message and "another run_dir" in message


def test_a_killed_owner_gives_way(start: Start, tmp_path: Path) -> None:
    process = start(_hold, tmp_path)
    process.kill()
    process.join()
    lock = take(tmp_path)
    with pytest.raises(RunLockedError, match=f"process {os.getpid()} "):
        take(tmp_path)
    lock.release()
    take(tmp_path).release()


def test_a_dying_owner_is_waited_for(start: Start, tmp_path: Path) -> None:
    """A process that it forked still holds the lock. The directory is free only when that has ended."""
    go_on = FORK.Event()
    process = start(_hold_with_child, tmp_path, go_on)
    process.kill()
    process.join()
    with pytest.raises(RunLockedError):
        take(tmp_path)
    threading.Timer(0.5, go_on.set).start()
    begin = time.monotonic()
    take(tmp_path, patience_s=20).release()
    assert go_on.is_set() and 0.1 < time.monotonic() - begin < 15


def test_only_one_of_many_gets_it(tmp_path: Path) -> None:
    """Ten try at once, many times over."""
    for attempt in range(5):
        run_dir, all_have_tried = tmp_path / str(attempt), FORK.Barrier(10)
        processes = [FORK.Process(target=_try, args=(run_dir, all_have_tried)) for _ in range(10)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(30)
        assert sorted(process.exitcode or 0 for process in processes) == [0] + [3] * 9


def _try(run_dir: Path, all_have_tried: Barrier) -> None:
    lock = None
    with contextlib.suppress(RunLockedError):
        lock = take(run_dir)
    all_have_tried.wait(20)
    os._exit(3 if lock is None else 0)


def test_another_host_is_not_judged_by_guess(tmp_path: Path) -> None:
    leave_behind(tmp_path, dataclasses.replace(ME, host="far", boot="other"))
    with pytest.raises(RunLockedError, match="cannot see whether far still runs it"):
        take(tmp_path)
    (tmp_path / FILE_NAME).unlink()
    take(tmp_path).release()


def test_a_host_that_was_started_anew_runs_nothing_of_before(tmp_path: Path) -> None:
    leave_behind(tmp_path, dataclasses.replace(ME, boot="an earlier one"))
    take(tmp_path).release()


@pytest.mark.parametrize(
    ("restart", "is_dead"),
    [(0, True), (1, False), (2, False)],
)
def test_an_earlier_life_of_the_same_slurm_job_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restart: int, is_dead: bool
) -> None:
    """Without a squeue to ask, a life that is not an earlier one may still be there."""
    monkeypatch.setenv("PATH", str(tmp_path))
    job = {"slurm_job": "17", "slurm_cluster": "c"}
    me = dataclasses.replace(ME, **job, slurm_restart=1)
    far = dataclasses.replace(ME, **job, slurm_restart=restart, host="far", boot="other")
    assert (why_alive(far, me, is_locked=True) is None) == is_dead


def test_without_locks_the_process_decides(start: Start, tmp_path: Path) -> None:
    """The file system refuses flock: a pid that now names another process is not the owner."""
    process = start(_hold, tmp_path)
    owner = Owner(**json.loads((tmp_path / FILE_NAME).read_text()))
    assert why_alive(owner, ME, is_locked=False) == "its process is alive"
    recycled = dataclasses.replace(owner, started=owner.started - 100)
    assert why_alive(recycled, ME, is_locked=False) is None
    process.kill()
    process.join()
    assert why_alive(owner, ME, is_locked=False) is None


def test_every_rank_is_told(workers: WorkerPool, start: Start, tmp_path: Path) -> None:
    process = start(_hold, tmp_path)
    for message in workers.run(2, _held_message, tmp_path):
        assert f"process {process.pid} on" in message


def test_a_directory_that_cannot_be_made(workers: WorkerPool, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for message in workers.run(2, _held_message, tmp_path / "file" / "run"):
        assert "cannot be written to" in message and "make it writable" in message


def _held_message(run_dir: Path) -> str:
    run_lock.PATIENCE_S = 0.1
    with pytest.raises(RunLockedError) as caught, run_lock.held(run_dir):
        pass
    return str(caught.value)
