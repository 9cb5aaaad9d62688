"""One start of a run: `python -m tests.train.tracking.wandb_part RUN_DIR MODE ID DONE FIRST LAST`.

Prints the run's id, the longest `log`, and the seconds that closing took, as JSON.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import sys
import time
from pathlib import Path

from nvlm_train.train.tracking.tracker import Tracker
from tests.train.tracking.test_tracking import make_recipe, record


def main(run_dir: str, mode: str, run_id: str, done: int, steps: range) -> dict:
    """Logs `steps`, as a start from a checkpoint after `done` steps would.

    With UNTIL_OFFLINE in the environment it goes on until wandb records offline, as a long run does.
    """
    assert mode in ("offline", "online")
    logging.basicConfig(level=logging.WARNING)
    worst, last = 0.0, steps[-1]
    with Tracker(make_recipe(Path(run_dir), mode), run_id or None, done, rank=0) as tracker:
        for step in itertools.count(steps[0]):
            if step > last:
                if "UNTIL_OFFLINE" not in os.environ or offline(Path(run_dir)):
                    break
                last, _ = step, time.sleep(0.2)
            start = time.perf_counter()
            tracker.log(record(step))
            worst = max(worst, time.perf_counter() - start)
        start = time.perf_counter()
    took = time.perf_counter() - start
    return {"id": tracker.run_id, "log": worst, "close": took, "last": step - 1}


def offline(run_dir: Path) -> bool:
    return any(run_dir.glob("wandb/offline-run-*/*.wandb"))


if __name__ == "__main__":
    directory, mode, run_id, done, first, last = sys.argv[1:]
    done_steps, own = int(done), range(int(first), int(last) + 1)
    sys.stdout.write(json.dumps(main(directory, mode, run_id, done_steps, own)) + "\n")
