"""Watches for hangs: after too long without progress every rank writes its stacks, and the run ends.

Each rank watches itself, and looks for the directory that another rank's watchdog may have made. The
ranks exchange files only, because in a hang collectives no longer work.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from nvlm_train.config.schema import HealthConfig
from nvlm_train.errors import TrainingError
from nvlm_train.train.health import collectives, ending
from nvlm_train.train.health.activity import Activity, patience

logger = logging.getLogger(__name__)

_MEETING_SECONDS = 20.0
"""How long a rank that found a hang waits for the others' stacks before it exits."""
_FROZEN_SECONDS = 10.0
"""How much later the timer in C acts, for a process whose threads cannot run. It is less than
`_MEETING_SECONDS`, so that the others still wait for this rank's stacks."""
_WAITING_CODE = ("torch/distributed/", "nvlm_train/parallel/waiting.py")
"""Parts of the paths of code that waits for other ranks."""
_LAST_RESORT_SECONDS = 120.0
"""How long ending the run may take, because the file system itself may hang."""


@dataclass(frozen=True)
class Member:
    """Identifies this process in a run, from one start to its end."""

    run_dir: Path
    rank: int
    world_size: int
    life: str
    """Name of this start of the run: the same on all ranks, another one after a restart."""


@dataclass(frozen=True)
class RankReport:
    """Says where one rank was when it hung. The file rank-N.json has these fields."""

    rank: int
    host: str
    pid: int
    doing: str
    seconds: float
    where: str
    """Innermost line of the training thread outside the code that waits for other ranks."""
    waits_in: str | None
    """Collective that the rank waits in; None for a rank that the others may be waiting for."""


class Watchdog:
    """Watches in a thread. A timer in C acts when the process cannot run its threads."""

    def __init__(self, member: Member, config: HealthConfig, activity: Activity) -> None:
        self._member, self._config, self._activity = member, config, activity
        self._training_thread = threading.get_ident()
        directory = member.run_dir / "health"
        directory.mkdir(parents=True, exist_ok=True)
        self._frozen = _frozen_file(directory, member.rank).open("w")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="nvlm-watchdog", daemon=True)
        self.progressed()
        self._thread.start()

    def progressed(self) -> None:
        """Restarts the timer in C. Called whenever the activity has changed."""
        self._end_without_python(patience(self._config, self._activity) + _FROZEN_SECONDS)

    def _end_without_python(self, after: float) -> None:
        faulthandler.dump_traceback_later(after, exit=True, file=self._frozen)

    def close(self) -> None:
        """Ends the thread and the timer."""
        self._ended.set()
        faulthandler.cancel_dump_traceback_later()
        self._thread.join()
        self._frozen.close()
        frozen = Path(self._frozen.name)
        if frozen.stat().st_size == 0:
            frozen.unlink()

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self._config.hang_floor_seconds / 10)):
            limit = patience(self._config, self._activity)
            idle = time.monotonic() - self._activity.since
            directory = hang_directory(self._member, self._activity)
            if idle > limit or (idle > limit / 2 and directory.exists()):
                self._end_run(directory, idle, limit)

    def _end_run(self, directory: Path, idle: float, limit: float) -> None:
        self._end_without_python(_LAST_RESORT_SECONDS)
        message = (
            f"no progress for {idle:.0f} s while {self._activity.doing} after step "
            f"{self._activity.step} of {self._activity.stage} (limit {limit:.0f} s: health.hang_factor="
            f"{self._config.hang_factor}, hang_floor_seconds={self._config.hang_floor_seconds}, "
            f"hang_grace_seconds={self._config.hang_grace_seconds})"
        )
        report = self._report(idle)
        write_stacks(directory, report, message)
        found = meet(directory, self._member.world_size)
        message = describe(message, directory, found, self._member.world_size)
        if self._member.rank == min(each.rank for each in found):
            logger.error("%s", message)
        else:
            # The rank that logs must not be killed by a launcher that sees another rank exit.
            time.sleep(1.0)
        ending.report(TrainingError(message))
        ending.leave(ending.EXIT_HANG)

    def _report(self, idle: float) -> RankReport:
        return RankReport(
            rank=self._member.rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            doing=self._activity.doing,
            seconds=idle,
            where=innermost_line(self._training_thread),
            waits_in=collectives.waiting_in(collectives.recorded()),
        )


def hang_directory(member: Member, activity: Activity) -> Path:
    """Returns the directory for the ranks' stacks. Its name says after which step they hang."""
    name = f"hang-{activity.stage or 'start'}-{activity.step:08d}-{member.life}"
    return member.run_dir / "health" / name


def write_stacks(directory: Path, report: RankReport, message: str) -> None:
    """Writes rank-N.txt (Python stacks of all threads), rank-N.trace.json (collectives), rank-N.json last."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"rank-{report.rank:05d}"
    with path.with_suffix(".txt").open("w") as file:
        file.write(f"rank {report.rank} on {report.host}, pid {report.pid}: {message}\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
    path.with_suffix(".trace.json").write_text(json.dumps(collectives.recorded()))
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(report)))
    os.replace(partial, path.with_suffix(".json"))


def meet(directory: Path, world_size: int) -> list[RankReport]:
    """Waits up to `_MEETING_SECONDS` for the reports of all ranks. Returns those there are, by rank."""
    deadline = time.monotonic() + _MEETING_SECONDS
    while len(_reports(directory)) < world_size and time.monotonic() < deadline:
        time.sleep(0.1)
    return [RankReport(**json.loads(path.read_text())) for path in _reports(directory)]


def _reports(directory: Path) -> list[Path]:
    return sorted(directory.glob("rank-[0-9]*[0-9].json"))


def describe(message: str, directory: Path, found: list[RankReport], world_size: int) -> str:
    """Returns the message about a hang: what happened, which ranks are suspect, where the stacks are."""
    lines = [f"hang: {message}"]
    silent = sorted(set(range(world_size)) - {each.rank for each in found})
    if silent:
        lines.append(_describe_silent(silent, directory.parent))
    suspects = [each for each in found if each.waits_in is None]
    if suspects and len(suspects) < len(found):
        lines += [f"rank {each.rank} on {each.host} is the one to look at: it is in {each.where}, "
                  "and the others wait for it" for each in suspects[:8]]  # fmt: skip
    else:
        lines += [f"rank {each.rank} on {each.host}: in {each.where}" for each in found[:8]]
    lines.append(f"stacks of {len(found)} of {world_size} ranks: {directory}")
    lines.append(
        f"leaving with exit code {ending.EXIT_HANG}; the same command goes on from the last save"
    )
    return "\n".join(lines)


def _describe_silent(ranks: list[int], health: Path) -> str:
    frozen = [_frozen_file(health, rank) for rank in ranks]
    stacks = [path.name for path in frozen if path.exists() and path.stat().st_size]
    where = f"stacks from C: {', '.join(stacks[:8])}" if stacks else "without a stack"
    return f"ranks {_few(ranks)} could run no Python, or are dead ({where})"


def _frozen_file(health: Path, rank: int) -> Path:
    return health / f"frozen-rank-{rank:05d}.txt"


def _few(ranks: list[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:8])
    return shown if len(ranks) <= 8 else f"{shown} and {len(ranks) - 8} more"


def innermost_line(thread: int) -> str:
    """Returns the innermost `file:line function` of a thread outside code that waits for other ranks."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        code = frame.f_code
        if not any(part in code.co_filename for part in _WAITING_CODE):
            return f"{code.co_filename}:{frame.f_lineno} {code.co_name}"
        frame = frame.f_back
    return "no Python code"
