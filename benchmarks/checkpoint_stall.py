"""Measures what saving costs training: the demo's model as TP2 x PP2, saved while it trains.

    python -m benchmarks.checkpoint_stall

Stall is the time that the slowest rank spends inside the saver, call by call: starting a save, polling its
writers, publishing it. What writers take from the training processes by sharing their cores is the
difference between steps with a save under way and steps without. The share of wall time is that of the
demo's recipe, which saves every 50 steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RANKS = 4
STEPS, INTERVAL, WARMUP = 30, 6, 5


def train_and_time(root: Path, out: Path) -> None:
    """Runs on every rank: the real loop with a stopwatch around the saver's methods."""
    import torch

    from nvlm_train.recipe.load import load_recipe
    from nvlm_train.train import loop
    from nvlm_train.train.checkpoint.saver import Saver

    torch.set_num_threads(1)
    stalls: list[tuple[str, float]] = []
    steps: list[tuple[float, bool]] = []
    """Seconds outside the saver, and whether writers were at work."""

    class TimedSaver(Saver):
        """Measures the saver's calls, and the sums of the weights that the loop takes before a save."""

        left = time.perf_counter()

        def save(self, *arguments: Any) -> None:
            self._timed("save", lambda: Saver.save(self, *arguments))
            name, seconds = stalls.pop()
            stalls.append((name, seconds + sums.pop()))

        def poll(self) -> None:
            steps.append((time.perf_counter() - self.left, self._under_way is not None))
            self._timed("poll", lambda: Saver.poll(self))

        def _timed(self, name: str, call: Any) -> None:
            start = time.perf_counter()
            call()
            self.left = time.perf_counter()
            stalls.append((name, self.left - start))

    original, sums = loop.start.run_state, []

    def timed_state(*arguments: Any) -> Any:
        start = time.perf_counter()
        state = original(*arguments)
        sums.append(time.perf_counter() - start)
        return state

    loop.start.run_state = timed_state  # type: ignore[assignment]
    loop.Saver = TimedSaver  # type: ignore[misc]
    recipe = load_recipe(
        ["experiment=demo", f"run_dir={root / 'run'}", f"loader.data_root={root}",
         "schedule=[pretrain]", f"stages.pretrain.steps={STEPS}", "stages.pretrain.batch.size=16",
         f"stages.pretrain.blend={root}/blend.yaml", f"checkpoint.interval_steps={INTERVAL}"]
    )  # fmt: skip
    loop.train(recipe)
    # The run has left its world.
    rank = os.environ["RANK"]
    (out / f"rank{rank}.json").write_text(json.dumps({"stalls": stalls, "steps": steps}))


def figures(out: Path, interval: int) -> dict[str, Any]:
    """Returns figures from what the ranks wrote. The slowest rank counts, call by call."""
    ranks = [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(RANKS)]
    calls = [
        (each[0][0], max(call[1] for call in each))
        for each in zip(*(rank["stalls"] for rank in ranks), strict=True)
    ]
    saves = [seconds for name, seconds in calls if name == "save"]
    polls = [seconds for name, seconds in calls if name == "poll"]
    saved = STEPS // INTERVAL
    publishing = sum(sorted(polls)[-saved:]) / saved
    steps = ranks[0]["steps"][WARMUP:]
    alone = [seconds for seconds, is_busy in steps if not is_busy]
    under_way = [seconds for seconds, is_busy in steps if is_busy]
    step = statistics.median(alone)
    stall = statistics.median(saves[1:]) + publishing
    # A save counts in the window when its writers were seen there.
    saves_seen = sum(index % INTERVAL == 0 for index in range(WARMUP, STEPS))
    slowed = sum(seconds - step for seconds in under_way) / saves_seen
    newest = next((out / "run" / "checkpoints").glob(f"pretrain-{STEPS:08d}"))
    written = sum(path.stat().st_size for path in newest.iterdir())
    return {
        "step_seconds": round(step, 3),
        "step_seconds_with_writers": round(statistics.median(under_way), 3) if under_way else None,
        "save_call_seconds": [round(each, 3) for each in saves],
        "publish_seconds": round(publishing, 3),
        "stall_seconds_per_save": round(stall, 3),
        "stall_steps_per_save": round(stall / step, 2),
        "slowed_by_writers_seconds_per_save": round(slowed, 3),
        "interval_steps": interval,
        "stall_percent_of_wall": round(100 * stall / (interval * step), 2),
        "with_slowed_steps_percent_of_wall": round(100 * (stall + slowed) / (interval * step), 2),
        "checkpoint_mib": round(written / 2**20, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        train_and_time(*options.worker)
        return 0
    from nvlm_train.recipe.load import load_recipe
    from tests.train.smoke import make_smoke_data

    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        make_smoke_data(root, samples=48)
        subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}",
             "-m", "benchmarks.checkpoint_stall", "--worker", str(root), str(root)],
            check=True, stdout=sys.stderr,
        )  # fmt: skip
        interval = load_recipe(["experiment=demo"]).checkpoint.interval_steps
        sys.stdout.write(json.dumps(figures(root, interval)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
