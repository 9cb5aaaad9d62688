"""The files of a wandb run's earlier parts, one directory a start, read by wandb's own reader."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

logger = logging.getLogger(__name__)


def last_local_step(directory: Path, run_id: str) -> int | None:
    """The last step in the parts of a run; none without a part that has a step.

    Args:
        directory: wandb's, inside the run directory.
        run_id: wandb's id of the run.
    """
    for path in sorted(directory.glob(f"*run-*-{run_id}/run-{run_id}.wandb"), key=_began)[::-1]:
        step = last_step(path)
        if step is not None:
            return step
    return None


def _began(path: Path) -> str:
    """`20261121_105246`, of `run-20261121_105246-ID` or `offline-run-20261121_105246-ID`."""
    return path.parent.name.split("run-", 1)[1]


def leave_out(directory: Path, run_id: str) -> None:
    """Marks offline parts as synced: their steps have been sent, `wandb sync` must not repeat them."""
    for path in directory.glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"):
        Path(f"{path}.synced").touch()


def last_step(path: Path) -> int | None:
    """The last step in a .wandb file, as wandb's own reader finds it; none when it has no step.

    The file of a run that was killed is read up to where it breaks off.
    """
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(path)]
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false"}
    found = subprocess.run(command, capture_output=True, env=environment, check=False)
    if found.returncode:
        logger.warning("%s cannot be read: %s", path, found.stderr.decode(errors="replace").strip())
        return None
    step = json.loads(found.stdout)["step"]
    return None if step is None else int(step)
