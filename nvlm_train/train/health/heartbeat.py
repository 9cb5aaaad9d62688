"""Writes RUN_DIR/heartbeat.json, which a monitor can read without talking to the run."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from nvlm_train.train.health.activity import Activity

FILE_NAME = "heartbeat.json"

logger = logging.getLogger(__name__)


class Heartbeat:
    """Writes what the process is doing from a thread, every `every` seconds and at the end.

    A file that is no longer renewed means a dead or frozen process. A fresh file with a large
    `seconds_since_progress` means a hang.
    """

    def __init__(self, run_dir: Path, activity: Activity, every: float) -> None:
        self._path, self._activity, self._every = run_dir / FILE_NAME, activity, every
        run_dir.mkdir(parents=True, exist_ok=True)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="nvlm-heartbeat", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Writes the file a last time and ends the thread."""
        self._ended.set()
        self._thread.join()

    def _beat(self) -> None:
        failing = ended = False
        while True:
            try:
                self._write()
                failing = False
            except OSError as error:
                # A full disk must not end the monitor of a run that still trains.
                if not failing:
                    logger.warning("%s cannot be written: %s", self._path, error)
                failing = True
            if ended:
                return
            ended = self._ended.wait(self._every)

    def _write(self) -> None:
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(snapshot(self._activity)) + "\n")
        os.replace(partial, self._path)


def snapshot(activity: Activity) -> dict[str, Any]:
    """Returns what a heartbeat says. `time` is in seconds since 1970; a loss that is not finite is None."""
    loss = activity.loss
    return {
        "time": time.time(),
        "doing": activity.doing,
        "stage": activity.stage,
        "step": activity.step,
        "loss": loss if loss is not None and abs(loss) < float("inf") else None,
        "seconds_since_progress": time.monotonic() - activity.since,
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }
