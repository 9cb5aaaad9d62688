"""One start of a run, in a process: `python -m tests.train.wandb_part RUN_DIR MODE ID DONE FIRST LAST`.

Prints the run's id, the longest `log`, and the seconds that closing took, as JSON.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path

from nvlm_train.train.tracking import Tracker
from tests.train.test_tracking import make_recipe, record


def main(run_dir: str, mode: str, run_id: str, done: int, steps: range) -> dict:
    """Logs `steps`, as a start from a checkpoint after `done` steps would."""
    assert mode in ("offline", "online")
    logging.basicConfig(level=logging.WARNING)
    worst = 0.0
    with Tracker(make_recipe(Path(run_dir), mode), run_id or None, done, rank=0) as tracker:
        for step in steps:
            start = time.perf_counter()
            tracker.log(record(step))
            worst = max(worst, time.perf_counter() - start)
            time.sleep(0.01)
        start = time.perf_counter()
    return {"id": tracker.run_id, "log": worst, "close": time.perf_counter() - start}


if __name__ == "__main__":
    directory, mode, run_id, done, first, last = sys.argv[1:]
    done_steps, own = int(done), range(int(first), int(last) + 1)
    sys.stdout.write(json.dumps(main(directory, mode, run_id, done_steps, own)) + "\n")
