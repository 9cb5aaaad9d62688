"""Who writes to a run directory, and whether it is still alive."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

FILE_NAME = "owner.json"
"""In the run directory; its writer holds a kernel lock on it (run_lock.py)."""

_ENDED = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL"),
    *("OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"),
}


@dataclass(frozen=True)
class Owner:
    """The process that writes to a run directory."""

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
        """This process."""
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
        """Whether SLURM ended this life of a job before it started the other's."""
        same_job = (self.slurm_job, self.slurm_cluster) == (other.slurm_job, other.slurm_cluster)
        return bool(self.slurm_job) and same_job and self.slurm_restart < other.slurm_restart


def read_owner(path: Path) -> Owner | None:
    """None where the last owner released the directory, or was just about to write its name."""
    try:
        return Owner(**json.loads(path.read_text()))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def why_alive(owner: Owner, me: Owner, is_locked: bool) -> str | None:
    """Why an owner that never released the directory may still write to it; none when it is dead.

    Args:
        owner: whom the directory names.
        me: who wants it.
        is_locked: whether the kernel gave `me` the lock; False on a file system without locks.
    """
    if owner.host == me.host and owner.boot != me.boot:
        return None  # the host has started anew since
    if owner.boot == me.boot:
        if is_locked:
            return None  # one kernel: it gave us the lock, so the owner has none
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
    """Why a job may still run, or none; squeue forgets jobs some minutes after their end."""
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
