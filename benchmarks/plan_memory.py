"""Measures the private memory of a rank's plan over 100 million samples, and how long its steps take.

    OMP_NUM_THREADS=1 python -m benchmarks.plan_memory

Writes indexes and lengths of three sources (shards beyond the first 300 are hard links to those, so
that 0.4 GB of disk do), opens the plan as a run does, and looks at steps all over the first
epochs. Private memory is Private_Clean + Private_Dirty of /proc/self/smaps_rollup (Linux): pages
that ranks of a node share are not in it, unless this process alone has them mapped.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.made_sources import KINDS, NoEncoder, write_source

SEQUENCE_LENGTH = 4096


def private_mib() -> float:
    """Returns the unique set size of this process, in MiB."""
    fields = Path("/proc/self/smaps_rollup").read_text().split("\n")
    sizes = [int(line.split()[1]) for line in fields if line.startswith("Private_")]
    return sum(sizes) / 1024


def look(root: Path, num_shards: int, unit: str, steps: int) -> dict[str, object]:
    """Opens the plan and asks for steps in order and far apart."""
    from typing import cast

    from nvlm_train.config.schema import BatchConfig
    from nvlm_train.data.plan.data_recipe import Blend, SourceConfig
    from nvlm_train.data.plan.plan import DataPlan
    from nvlm_train.data.plan.sources import open_sources
    from nvlm_train.data.samples.encoder import SampleEncoder
    from nvlm_train.data.shards.store import Store

    imported = private_mib()
    sources = tuple(
        SourceConfig(kind, tuple(f"{kind}-{number:06d}.tar" for number in range(num_shards)))
        for kind in KINDS
    )
    start = time.perf_counter()
    opened = open_sources(Blend("mix", sources), Store(str(root)), cast(SampleEncoder, NoEncoder()))
    batch = BatchConfig(128, "samples" if unit == "samples" else "packs")
    plan = DataPlan(opened, batch, SEQUENCE_LENGTH, 1, 0.0)
    open_seconds = time.perf_counter() - start
    after_open = private_mib()
    peak, times = after_open, []
    far = 600_000 if unit == "samples" else 0
    for step in [*range(steps), *range(far, far + 100_000 * bool(far), 4000)]:
        start = time.perf_counter()
        for packs in plan.step(step, 8).packs:
            for pack in packs:
                for sample in pack.samples:
                    plan.info(sample)
        times.append(time.perf_counter() - start)
        peak = max(peak, private_mib())
    return {
        "unit": unit, "samples": sum(source.num_samples for source in opened),
        "shards": num_shards * len(sources), "private_mib_imports": round(imported, 1),
        "private_mib_opened": round(after_open, 1), "private_mib_peak": round(peak, 1),
        "peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "open_s": round(open_seconds, 2), "slowest_step_s": round(max(times), 3),
    }  # fmt: skip


def main() -> int:
    """Prints one line of JSON a case and one for all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=100_000_000)
    parser.add_argument("--rows", type=int, default=10_000, help="samples of a shard")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--distinct", type=int, default=300, help="shards that are no links")
    parser.add_argument("--look", nargs=2, metavar=("ROOT", "UNIT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    num_shards = -(-options.samples // options.rows // len(KINDS))
    if options.look:
        root, unit = options.look
        print(json.dumps(look(Path(root), num_shards, unit, options.steps)))
        return 0
    found = []
    with tempfile.TemporaryDirectory() as directory:
        distinct = min(num_shards, options.distinct // len(KINDS))
        for kind in KINDS:
            write_source(Path(directory), kind, num_shards, options.rows, SEQUENCE_LENGTH, distinct)
        for unit in ("samples", "packs"):
            # A process of its own, so that writing does not count.
            command = [sys.executable, "-m", "benchmarks.plan_memory", *sys.argv[1:]]
            output = subprocess.run(
                [*command, "--look", directory, unit], check=True, capture_output=True, text=True
            ).stdout
            print(output.strip())
            found.append(json.loads(output.splitlines()[-1]))
    print(json.dumps({"cases": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
