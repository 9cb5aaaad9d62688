"""Measures what watching a run costs a step: the watchdog, the loss window, and torch's flight recorder.

    python -m benchmarks.health_cost

One gloo process, so a collective is only its overhead. The last line is one JSON object; times are
microseconds, medians of 5 repeats.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

REPEATS, CALLS = 5, 2000


def microseconds(function: Callable[[], object]) -> float:
    """Returns the median microseconds of one call."""
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        for _ in range(CALLS):
            function()
        times.append((time.perf_counter() - began) / CALLS * 1e6)
    return statistics.median(times)


def watching() -> dict[str, float]:
    """Measures a step's calls into the health package, with a full window."""
    from nvlm_train.config.schema import HealthConfig
    from nvlm_train.train.health.activity import Activity
    from nvlm_train.train.health.losses import LossWatch
    from nvlm_train.train.health.watchdog import Member, Watchdog

    config, activity = HealthConfig(), Activity()
    activity.start_stage("sft", 0)
    losses = LossWatch(config, [(2.0 + 0.001 * number, True) for number in range(128)])
    with tempfile.TemporaryDirectory() as directory:
        watchdog = Watchdog(Member(Path(directory), 0, 1, "life"), config, activity)

        def step() -> None:
            activity.stepped(activity.step + 1, 2.0)
            watchdog.progressed()

        found = {
            "watchdog_us": microseconds(step),
            "losses_us": microseconds(lambda: losses.add(2.0, True)),
        }
        watchdog.close()
    return found


def collective() -> float:
    """Measures one small all-reduce, in microseconds."""
    import torch
    import torch.distributed as dist

    with tempfile.TemporaryDirectory() as directory:
        store = dist.FileStore(f"{directory}/store", 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        one = torch.ones(1)
        found = microseconds(lambda: dist.all_reduce(one))
        dist.destroy_process_group()
    return found


def with_recorder(entries: int) -> float:
    """Runs `collective` in a process of its own, because the recorder's size is read only once."""
    environment = {**os.environ, "TORCH_FR_BUFFER_SIZE": str(entries)}
    command = [sys.executable, "-m", "benchmarks.health_cost", "collective"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


if __name__ == "__main__":
    if sys.argv[1:] == ["collective"]:
        print(collective())
    else:
        recorder = {
            "all_reduce_us": with_recorder(0),
            "all_reduce_recorded_us": with_recorder(2000),
        }
        print(json.dumps({**watching(), **recorder}))
