"""Measures packing, balance and speed of plans on a realistic mix of lengths.

    OMP_NUM_THREADS=1 python -m benchmarks.plan [--longer]

For sequence lengths of 1,024 to 4,096, batches of 64 and 128 packs and 2 to 8 data-parallel ranks:
the share of the token budget that packs use, and max / mean over ranks of tokens and tiles, the
worst step and the mean of all; then how long a step's plan and a far step take. With `--longer` instead
the same of steps of 128 and 256 samples in packs as long as a sample may be, and in longer ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast
from unittest import mock

from benchmarks import made_sources
from benchmarks.made_sources import NoEncoder, write_source
from nvlm_train.batch import PackPlan
from nvlm_train.config.schema import BatchConfig
from nvlm_train.data.plan.attention_cost import AttentionCost
from nvlm_train.data.plan.data_recipe import Blend, SourceConfig
from nvlm_train.data.plan.packing import Packing
from nvlm_train.data.plan.plan import DataPlan
from nvlm_train.data.plan.sources import open_sources
from nvlm_train.data.plan.statistics import budget, imbalance, rank_loads
from nvlm_train.data.samples.encoder import SampleEncoder
from nvlm_train.data.shards.store import Store
from nvlm_train.geometry import lengths_between

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


class Longer(NamedTuple):
    """A stage whose steps count samples."""

    architecture: str
    sequence_length: int
    pack_length: int
    samples: int
    in_decoder: int
    """Tokens in the decoder for each tile: of X none, of H the thumbnail's, on average."""
    attention: AttentionCost


_D, _X = AttentionCost(28), AttentionCost(28, 2 * 7 * 256)
LONGER = [
    *(Longer("d", 3200, length, 128, 256, _D) for length in (3200, 4096, 8192)),
    *(Longer("x", 1024, length, 256, 0, _X) for length in (1024, 2048, 4096)),
    *(
        Longer("h", 1280, length, 256, 60, replace(_X, tiles_in_decoder=1))
        for length in (1280, 4096)
    ),
]
"""SFT of the recipes of 8B, and pack lengths beside theirs."""


def measure_longer(case: Longer, steps: int, dp_size: int) -> dict[str, Any]:
    """Returns figures of the first steps of a stage, each a mean."""
    with (
        tempfile.TemporaryDirectory() as directory,
        mock.patch.object(made_sources, "TILE_TOKENS", case.in_decoder),
    ):
        blend = make_blend(Path(directory), case.sequence_length, num_shards=4, rows=1000)
        sources = open_sources(blend, Store(directory), cast(SampleEncoder, NoEncoder()))
        lengths = lengths_between(case.sequence_length, case.pack_length, tensor=8)
        packing, batch = Packing(lengths, case.attention), BatchConfig(case.samples)
        plan = DataPlan(sources, batch, case.sequence_length, 1, 0.0, None, packing)
        start = time.process_time()
        planned = [plan.step(step, dp_size) for step in range(steps)]
        seconds = (time.process_time() - start) / steps
    loads: dict[str, Callable[[PackPlan], int]] = {
        "tokens": lambda pack: pack.num_tokens,
        "tiles": lambda pack: pack.num_tiles,
        "attention": case.attention.of_pack,
    }
    found = {
        "packs_a_rank": statistics.fmean(max(map(len, step.packs)) for step in planned),
        "pack_length": statistics.fmean(step.pack_length for step in planned),
        "used": statistics.fmean(
            sum(rank_loads(step, loads["tokens"])) / budget(step) for step in planned
        ),
        "plan_ms": seconds * 1e3,
    }
    for name, load in loads.items():
        found[f"{name}_rank"] = statistics.fmean(
            imbalance(rank_loads(step, load)) for step in planned
        )
        found[f"{name}_pack"] = statistics.fmean(
            imbalance([load(pack) for own in step.packs for pack in own]) for step in planned
        )
    return {key: round(value, 3) for key, value in found.items()}


def main_longer(steps: int) -> None:
    """Prints a line of JSON for every case."""
    for case in LONGER:
        for dp_size in (4, 8):
            named = {"case": f"{case.architecture} {case.sequence_length} in {case.pack_length}"}
            print(
                json.dumps(named | {"dp": dp_size} | measure_longer(case, steps, dp_size)),
                flush=True,
            )


def main() -> int:
    """Prints every case, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--window", type=int, default=BatchConfig(1).window)
    parser.add_argument("--far", action="store_true", help=f"find step {FAR}, too (minutes)")
    parser.add_argument("--longer", action="store_true", help="packs longer than samples")
    options = parser.parse_args()
    if options.longer:
        main_longer(options.steps)
        return 0
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
