"""Measures packing, balance and speed of plans on a realistic mix of lengths.

    OMP_NUM_THREADS=1 python -m benchmarks.plan

For sequence lengths of 1,024 to 4,096, batches of 64 and 128 packs and 2 to 8 data-parallel ranks:
the share of the token budget that packs use, and max / mean over ranks of tokens and tiles, the
worst step and the mean of all; then how long a step's plan and a far step take.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, cast

from benchmarks.made_sources import NoEncoder, write_source
from nvlm_train.config.schema import BatchConfig
from nvlm_train.data.plan.data_recipe import Blend, SourceConfig
from nvlm_train.data.plan.plan import DataPlan
from nvlm_train.data.plan.sources import open_sources
from nvlm_train.data.samples.encoder import SampleEncoder
from nvlm_train.data.shards.store import Store

WEIGHTS = {"captions": 0.45, "documents": 0.25, "chats": 0.3}
SHARDS, ROWS = 24, 2000
FAR = 100_000


def make_blend(
    root: Path, sequence_length: int, num_shards: int = SHARDS, rows: int = ROWS
) -> Blend:
    """Makes three sources of lengths for packs of this length."""
    sources = [
        SourceConfig(
            kind, write_source(root, kind, num_shards, rows, sequence_length, num_shards), weight
        )
        for kind, weight in WEIGHTS.items()
    ]
    return Blend("mix", tuple(sources))


def open_plan(root: Path, blend: Blend, sequence_length: int, batch: BatchConfig) -> DataPlan:
    """Opens a plan as a run opens it."""
    sources = open_sources(blend, Store(str(root)), cast(SampleEncoder, NoEncoder()))
    return DataPlan(sources, batch, sequence_length, 1, 0.0, root / "table")


def measure(plan: DataPlan, steps: int) -> dict[str, Any]:
    """Returns figures of the first steps."""
    full, times = [], []
    imbalance: dict[str, list[float]] = {}
    for step in range(steps):
        for dp_size in (2, 4, 8):
            # CPU seconds: other work on the machine does not count.
            start = time.process_time()
            ranks = plan.step(step, dp_size).packs
            times.append(time.process_time() - start)
            for what in ("tokens", "tiles"):
                loads = [sum(getattr(pack, f"num_{what}") for pack in own) for own in ranks]
                ratio = max(loads) / statistics.fmean(loads)
                imbalance.setdefault(f"{what}_dp{dp_size}", []).append(ratio)
        packs = [pack for own in ranks for pack in own]
        full.append(sum(pack.num_tokens for pack in packs) / len(packs) / plan.sequence_length)
    worst = {key: round(max(values), 4) for key, values in imbalance.items()}
    means = {key: round(statistics.fmean(values), 4) for key, values in imbalance.items()}
    return {
        "budget_used": round(statistics.fmean(full), 4),
        "worst_imbalance": worst,
        "mean_imbalance": means,
        "plan_ms_mean": round(statistics.fmean(times) * 1e3, 2),
        "plan_ms_max": round(max(times) * 1e3, 2),
    }


def measure_far(
    root: Path, blend: Blend, sequence_length: int, batch: BatchConfig
) -> dict[str, Any]:
    """Returns the seconds to find a far step: counting from nothing, with the table's file, and once open."""
    plan = open_plan(root, blend, sequence_length, batch)
    start = time.perf_counter()
    wanted = plan.step(FAR, 8)
    counted = time.perf_counter() - start
    table = plan.packs_before
    table.extend([])
    start = time.perf_counter()
    again = open_plan(root, blend, sequence_length, batch)
    opened = time.perf_counter() - start
    found = again.step(FAR, 8)
    with_file = time.perf_counter() - start - opened
    assert found == wanted, "the table changed the plan"
    start = time.perf_counter()
    again.step(FAR + 1, 8)
    return {
        "unit": batch.unit, "size": batch.size, "windows": table.num_windows,
        "without_table_s": round(counted, 4), "with_table_s": round(with_file, 4),
        "next_step_s": round(time.perf_counter() - start, 4), "open_plan_s": round(opened, 4),
    }  # fmt: skip


def main() -> int:
    """Prints every case, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--window", type=int, default=BatchConfig(1).window)
    parser.add_argument("--far", action="store_true", help=f"find step {FAR}, too (minutes)")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for length in (1024, 2048, 4096):
        with tempfile.TemporaryDirectory() as directory:
            root = Path(directory)
            blend = make_blend(root, length)
            for size in (64, 128):
                batch = BatchConfig(size, "packs", options.window)
                found[f"{length}x{size}"] = measure(
                    open_plan(root, blend, length, batch), options.steps
                )
                print(length, size, json.dumps(found[f"{length}x{size}"]))
            if options.far and length == 4096:
                found["far_samples"] = measure_far(root, blend, length, BatchConfig(256))
                found["far_packs"] = measure_far(root, blend, length, batch)
                print(found["far_samples"], found["far_packs"])
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
