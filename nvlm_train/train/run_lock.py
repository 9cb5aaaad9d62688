"""Keeps a run directory to one writer: rank 0 holds a kernel lock on a file that names the holder.

The kernel releases the lock when the owner and the processes that it forked have died, however they
die. When the owner ran on another host, the kernel may not know whether it lives, because not every
network file system carries locks: SLURM is asked then.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

from nvlm_train.errors import RunLockedError

logger = logging.getLogger(__name__)

FILE_NAME = "owner.json"
"""Lies in the run directory; the writer of the directory holds a kernel lock on it."""

PATIENCE_S = 10.0
"""How long an owner may take to die before the directory is refused."""
REQUEUE_PATIENCE_S = 120.0
"""The same for an earlier life of this SLURM job; an NFS server frees a lost host's locks after 90 s."""

_ENDED = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL"),
    *("OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"),
}
"""States of a SLURM job that no longer runs."""


@dataclass(frozen=True)
class Owner:
    """Identifies the process that writes to a run directory."""

    host: str
    boot: str
    """Identifies one start of one kernel."""
    pid: int
    started: float
    """When the process started, in seconds since 1970."""
    slurm_job: str | None = None
    slurm_cluster: str | None = None
    slurm_restart: int = 0
    """How often SLURM had requeued the job."""

    @classmethod
    def here(cls, environment: Mapping[str, str] = os.environ) -> Owner:
        """Returns this process."""
        return cls(
            host=socket.gethostname(),
            boot=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            pid=os.getpid(),
            started=psutil.Process().create_time(),
            slurm_job=environment.get("SLURM_JOB_ID"),
            slurm_cluster=environment.get("SLURM_CLUSTER_NAME"),
            slurm_restart=int(environment.get("SLURM_RESTART_COUNT", "0")),
        )

    def __str__(self) -> str:
        job = f", SLURM job {self.slurm_job}" if self.slurm_job else ""
        restart = f" restart {self.slurm_restart}" if self.slurm_restart else ""
        since = datetime.fromtimestamp(self.started, UTC).isoformat(" ", "seconds")
        return f"process {self.pid} on {self.host}{job}{restart}, started {since}"

    def is_earlier_life_of(self, other: Owner) -> bool:
        """Returns whether SLURM ended this owner and then requeued its job as `other`."""
        same_job = (self.slurm_job, self.slurm_cluster) == (other.slurm_job, other.slurm_cluster)
        return bool(self.slurm_job) and same_job and self.slurm_restart < other.slurm_restart


def read_owner(path: Path) -> Owner | None:
    """Reads who owns a run directory.

    Returns:
        None when the last owner released the directory, or has not written its name yet.
    """
    try:
        return Owner(**json.loads(path.read_text()))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def why_alive(owner: Owner, me: Owner, is_locked: bool) -> str | None:
    """Says why an owner that never released the directory may still write to it.

    Args:
        owner: the process that the directory names.
        me: the process that wants the directory.
        is_locked: whether the kernel gave `me` the lock; False on a file system without locks.

    Returns:
        The reason, or None when the owner is dead.
    """
    if owner.host == me.host and owner.boot != me.boot:
        return None  # the host has restarted since
    if owner.boot == me.boot:
        if is_locked:
            return None  # the same kernel gave us the lock, so the owner has none
        return "its process is alive" if _lives(owner) else None
    if owner.is_earlier_life_of(me):
        return None
    if owner.slurm_job and owner.slurm_cluster == me.slurm_cluster:
        return slurm_says_alive(owner.slurm_job)
    return f"this host cannot see whether {owner.host} still runs it"


def _lives(owner: Owner) -> bool:
    try:
        return abs(psutil.Process(owner.pid).create_time() - owner.started) < 1
    except psutil.NoSuchProcess:
        return False


def slurm_says_alive(job: str) -> str | None:
    """Says why a SLURM job may still run, or None. squeue forgets jobs some minutes after their end."""
    command = ["squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"SLURM does not answer ({error})"
    if answer.returncode == 0:
        states = set(answer.stdout.split())
        return None if states <= _ENDED else f"SLURM has its job as {', '.join(sorted(states))}"
    if "Invalid job id" in answer.stderr:
        return None
    return f"SLURM does not answer ({answer.stderr.strip()})"


class RunLock:
    """Holds a run directory from its construction to `release`, or until the process dies.

    Args:
        run_dir: is made when it is not there.
        me: this process.
        patience_s: seconds to wait for another holder; None for the module's constants.

    Raises:
        RunLockedError: another process writes to the directory, or nobody can tell.
        OSError: the directory cannot be written to.
    """

    def __init__(self, run_dir: Path, me: Owner, patience_s: float | None = None) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._path = run_dir / FILE_NAME
        self._descriptor, is_locked = _wait_for_kernel(self._path, me, patience_s)
        last = read_owner(self._path)
        if last is not None:
            alive = why_alive(last, me, is_locked)
            if alive is not None:
                os.close(self._descriptor)
                raise _refusal(self._path, last, alive)
            logger.warning("%s: its last owner died (%s); taking over", run_dir, last)
        self._write(json.dumps(dataclasses.asdict(me), indent=1) + "\n")

    def release(self) -> None:
        """Marks the directory as free. The file stays, because removing it would be a race."""
        self._write("")
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        os.close(self._descriptor)

    def _write(self, text: str) -> None:
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, text.encode(), 0)
        os.fsync(self._descriptor)


@contextlib.contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Holds the run directory on rank 0 while the block runs. Called by every rank.

    Raises:
        RunLockedError: on every rank, when rank 0 cannot hold it; names the owner and the remedy.
    """
    # Imported here, because `nvlm doctor` reads the owner's file before torch is imported.
    import torch.distributed as dist

    lock: RunLock | None = None
    refused: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            lock = RunLock(run_dir, Owner.here())
        except RunLockedError as error:
            refused = [str(error)]
        except OSError as error:
            refused = [f"run_dir={run_dir} cannot be written to ({error}); make it writable"]
    dist.broadcast_object_list(refused, src=0)
    if refused[0] is not None:
        raise RunLockedError(refused[0])
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def _wait_for_kernel(path: Path, me: Owner, patience_s: float | None) -> tuple[int, bool]:
    """Opens the owner's file and waits for its lock.

    Returns:
        The open file, and whether it is locked: False when the file system has no locks.
    """
    start, announced = time.monotonic(), False
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor, True
        except BlockingIOError:
            os.close(descriptor)
        except OSError as error:
            logger.warning(
                "%s: no locks on this file system (%s); asking for processes", path, error
            )
            return descriptor, False
        owner = read_owner(path)
        patience = patience_s if patience_s is not None else _patience(owner, me)
        if time.monotonic() - start > patience:
            raise _refusal(path, owner, "it holds the lock")
        if not announced:
            logger.warning("%s is held by %s; waiting up to %.0f s", path.parent, owner, patience)
            announced = True
        time.sleep(0.2)


def _patience(owner: Owner | None, me: Owner) -> float:
    return REQUEUE_PATIENCE_S if owner and owner.is_earlier_life_of(me) else PATIENCE_S


def _refusal(path: Path, owner: Owner | None, why: str) -> RunLockedError:
    named = owner or "a process that has just begun, or is ending"
    return RunLockedError(
        f"run_dir={path.parent} belongs to {named}: {why}; wait for it, stop it, or use another run_dir. "
        f"Where you know that it is dead, remove {path}"
    )
