"""Records a whole training run as one wandb run. No other file imports wandb; this one does on request.

All calls of wandb are made in one thread. Training hands its records to the thread and never waits for
it, except for a bounded time at the end. Without a server the records go to a directory that
`wandb sync` uploads later.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import os
import queue
import secrets
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nvlm_train.config.schema import Recipe
from nvlm_train.train.tracking.metrics_log import Record, read_metrics

if TYPE_CHECKING:
    from wandb import Run

    from nvlm_train.train.tracking.examples import Example

logger = logging.getLogger(__name__)

START_SECONDS = 20
"""How long the server may take to open the run before it is recorded offline instead."""
FINISH_SECONDS = 20
"""How long wandb may upload after the last step; the rest stays in the run's directory."""
CLOSE_SECONDS = START_SECONDS + FINISH_SECONDS + 10
"""The longest that `close` waits, whatever wandb does."""
MOST_WAITING = 100_000
"""Number of records that may wait for the thread; later ones are left out of wandb."""

_USERS_DATA_DIR = os.environ.get("WANDB_DATA_DIR")

Mode = Literal["online", "offline"]


@dataclass(frozen=True)
class _End:
    """Tells the thread to finish the run."""

    exit_code: int


@dataclass(frozen=True)
class _Examples:
    """Hands answers to the thread."""

    stage: str
    global_step: int
    rows: tuple[Example, ...]


class WandbRun:
    """Records rank 0's steps in wandb. A server that fails raises no error and stops no step.

    Each start of a training run is a part of the same wandb run. wandb's step is `global_step`, so a part
    begins after the last step that wandb has, and steps that wandb missed (a power cut, an outage)
    are sent again from metrics.jsonl.

    Args:
        recipe: its `tracking`, name and run directory are used; all of it is stored as wandb's config.
        run_id: wandb's id of the run that is continued, or None for a new one.
        steps_done: steps that the run has done; metrics.jsonl ends there.
        metrics: the run's metrics.jsonl.

    Raises:
        ImportError: wandb is not installed.
    """

    def __init__(self, recipe: Recipe, run_id: str | None, steps_done: int, metrics: Path) -> None:
        if importlib.util.find_spec("wandb") is None:
            raise ImportError("tracking.wandb needs wandb: pip install wandb, or set it to off")
        self.id = run_id or secrets.token_hex(4)
        self._recipe, self._steps_done, self._metrics = recipe, steps_done, metrics
        self._waiting: queue.SimpleQueue[Record | _Examples | _End] = queue.SimpleQueue()
        self._is_full = False
        self._thread = threading.Thread(target=self._serve, name="wandb", daemon=True)
        self._thread.start()

    def log(self, record: Record) -> None:
        """Hands one step's record to the thread."""
        self._put(record)

    def log_examples(self, stage: str, global_step: int, rows: Sequence[Example]) -> None:
        """Hands answers to the thread, which shows them as a table with their tiles."""
        self._put(_Examples(stage, global_step, tuple(rows)))

    def close(self, exit_code: int) -> None:
        """Ends this part within CLOSE_SECONDS. wandb shows another exit code than 0 as failed."""
        self._waiting.put(_End(exit_code))
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            logger.warning(
                "wandb did not finish in %d s and is left; metrics.jsonl has all steps",
                CLOSE_SECONDS,
            )

    def _put(self, entry: Record | _Examples) -> None:
        if not self._thread.is_alive():
            return  # the thread said why when it ended
        if self._waiting.qsize() < MOST_WAITING:
            self._waiting.put(entry)
        elif not self._is_full:
            self._is_full = True
            logger.warning("wandb takes no records; more are left out until the next start")

    def _serve(self) -> None:
        # Tables keep their images there until they are uploaded, by default in this machine's home.
        os.environ["WANDB_DATA_DIR"] = _USERS_DATA_DIR or str(self._directory.absolute())
        import wandb

        # What wandb raises when a server, its own process or a disk fails.
        failures: tuple[type[BaseException], ...] = (wandb.Error, OSError, RuntimeError)
        failures += _mailbox_errors()
        try:
            run, first = self._open(failures)
            exit_code = self._record(run, first)
            run.finish(exit_code=exit_code)
        except failures as error:
            logger.warning(
                "wandb stopped (%s: %s); training goes on, metrics.jsonl has every step, and the next "
                "start sends what wandb missed",
                type(error).__name__, error,
            )  # fmt: skip

    def _record(self, run: Run, first: int) -> int:
        """Sends entries to wandb until the end. Returns the exit code."""
        every = self._recipe.tracking.log_every
        for record in self._missed(first):
            if int(record["global_step"]) % every == 0:
                run.log(dict(record), step=int(record["global_step"]))
        while True:
            entry = self._waiting.get()
            if isinstance(entry, _End):
                return entry.exit_code
            if isinstance(entry, _Examples):
                if entry.global_step >= first:
                    key = f"examples/{entry.stage}"
                    run.log({key: _table(entry.rows)}, step=entry.global_step)
            elif int(entry["global_step"]) >= first and int(entry["global_step"]) % every == 0:
                run.log(dict(entry), step=int(entry["global_step"]))

    def _missed(self, first: int) -> Iterator[Record]:
        """Yields the records of earlier starts that wandb does not have."""
        if first > self._steps_done or not self._metrics.exists():
            return
        for record in read_metrics(self._metrics):
            if first <= int(record["global_step"]) <= self._steps_done:
                yield record

    def _open(self, failures: tuple[type[BaseException], ...]) -> tuple[Run, int]:
        """Opens the run. Returns it, and the first step that it does not have yet."""
        import wandb

        if self._recipe.tracking.wandb == "online":
            problem = "" if login() else "not logged in: run `wandb login` or set WANDB_API_KEY"
            if not problem:
                try:
                    run = self._start("online")
                except failures as error:
                    problem = f"{type(error).__name__}: {error}"
                    # wandb's own process still holds the run's id, and would go on trying.
                    wandb.teardown(exit_code=1)
                else:
                    leave_out(self._directory, self.id)
                    return run, int(run.step)
            logger.warning(
                "wandb is not reachable (%s); this start is recorded offline in %s: upload it with "
                "`wandb sync %s`, or start again online",
                problem, self._directory, self._directory / f"offline-run-*-{self.id}",
            )  # fmt: skip
        last = last_local_step(self._directory, self.id)
        return self._start("offline"), (self._steps_done if last is None else last) + 1

    def _start(self, mode: Mode) -> Run:
        import wandb

        tracking = self._recipe.tracking
        Path(self._recipe.run_dir).mkdir(parents=True, exist_ok=True)
        run = wandb.init(
            project=tracking.project,
            entity=tracking.entity,
            name=self._recipe.name,
            id=self.id,
            # Needed offline, too: it marks the part, so that `wandb sync` appends it instead of
            # overwriting the parts before it.
            resume="allow",
            dir=self._recipe.run_dir,
            mode=mode,
            config=dataclasses.asdict(self._recipe),
            settings=wandb.Settings(
                silent=True,
                console="wrap",
                init_timeout=START_SECONDS,
                finish_timeout=FINISH_SECONDS,
            ),
        )
        run.define_metric("global_step")
        run.define_metric("*", step_metric="global_step")
        return run

    @property
    def _directory(self) -> Path:
        return Path(self._recipe.run_dir) / "wandb"


def server() -> str:
    """Returns the address of wandb's server, from wandb's settings and environment variables."""
    import wandb

    address: str = wandb.setup(settings=wandb.Settings(silent=True)).settings.base_url
    return address


def login() -> str | None:
    """Returns the server that there are credentials for, or None. It never prompts."""
    from wandb.sdk.lib import wbauth

    host = server()
    found = wbauth.authenticate_session(host=host, source="nvlm", no_offline=True, prompt=False)
    return host if found else None


def _mailbox_errors() -> tuple[type[BaseException], ...]:
    from wandb.sdk.mailbox.mailbox_handle import HandleAbandonedError, ServerResponseError

    return HandleAbandonedError, ServerResponseError


def _table(rows: Sequence[Example]) -> object:
    import wandb

    names: list[str | int] = ["source", "sample", "question", "reference", "answer", "tiles"]
    table = wandb.Table(columns=names)
    for row in rows:
        image = wandb.Image(row.tiles_HWC, caption=row.tags) if row.tiles_HWC.size else None
        table.add_data(row.source, row.key, row.question, row.reference, row.answer, image)
    return table


def last_local_step(directory: Path, run_id: str) -> int | None:
    """Returns the last step in the local parts of a run; None when no part has a step.

    Args:
        directory: wandb's directory inside the run directory.
        run_id: wandb's id of the run.
    """
    for path in sorted(directory.glob(f"*run-*-{run_id}/run-{run_id}.wandb"), key=_began)[::-1]:
        step = last_step(path)
        if step is not None:
            return step
    return None


def _began(path: Path) -> str:
    """Returns `20261121_105246` for `run-20261121_105246-ID` and `offline-run-20261121_105246-ID`."""
    return path.parent.name.split("run-", 1)[1]


def leave_out(directory: Path, run_id: str) -> None:
    """Marks offline parts as synced: their steps have been sent, so `wandb sync` must not repeat them."""
    for path in directory.glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"):
        Path(f"{path}.synced").touch()


def last_step(path: Path) -> int | None:
    """Returns the last step in a .wandb file, as wandb's own reader finds it; None when it has no step.

    The file of a run that was killed is read up to the point where it breaks off.
    """
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(path)]
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false"}
    found = subprocess.run(command, capture_output=True, env=environment, check=False)
    if found.returncode:
        logger.warning("%s cannot be read: %s", path, found.stderr.decode(errors="replace").strip())
        return None
    step = json.loads(found.stdout)["step"]
    return None if step is None else int(step)
