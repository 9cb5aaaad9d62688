"""Tables for benchmarks/results/ from what gpu.py and gpu_parts.py printed.

    python -m benchmarks.gpu.tables RESULT.json...

Rows of several files are joined, those of later files last. What is asked of a GPU comes first, beside what
was measured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import targets

Row = Mapping[str, Any]

TRAINING = {
    "packs": "packs",
    "ms": "ms a step",
    "tokens_per_s": "tokens/s",
    "samples_per_s": "samples/s",
    "mfu": "MFU",
    "gpu_ms": "GPU ms",
    "busy": "busy",
    "launches": "launches",
    "synchronisations": "syncs",
    "host_reads": "host reads",
    "encode_ms": "encoder ms",
    "data_ms": "data ms",
    "loader_samples_per_s": "loader samples/s",
    "peak_gib": "peak GiB",
    "predicted_gib": "predicted",
}
ENCODERS = {
    "batch_tiles": "batch",
    "tiles_per_s": "tiles/s",
    "mfu": "MFU",
    "busy": "busy",
    "launches": "launches",
    "peak_gib": "peak GiB",
}
PARTS = {
    "batch": "batch",
    "error": "error",
    "ms": "ms",
    "gpu_ms": "GPU ms",
    "kernels": "kernels",
    "launches": "launches",
    "synchronisations": "syncs",
    "peak_mib": "peak MiB",
    "tflop_per_s": "TFLOP/s",
    "tiles_per_s": "tiles/s",
    "mfu": "MFU",
    "ms_per_billion": "ms a billion",
}


def table(first: str, columns: Mapping[str, str], rows: Iterable[tuple[str, Row]]) -> str:
    """Markdown; columns that no row has are left out, and a row that failed shows why."""
    kept = list(rows)
    names = [name for name in columns if any(row.get(name) is not None for _, row in kept)]
    lines = [[first, *(columns[name] for name in names)], ["---"] * (len(names) + 1)]
    for title, row in kept:
        failed = row.get("error") if isinstance(row.get("error"), str) else row.get("failed")
        if failed:
            lines.append([title, f"failed: {failed}".replace("|", "/").replace("\n", " ")])
        else:
            lines.append([title, *(_cell(row.get(name)) for name in names)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) and abs(value) < 1000 else f"{value:,.0f}"


def tables(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of gpu.py's rows: targets, training, encoders; of gpu_parts.py's one table for each part."""
    steps: dict[str, Row] = {}
    parts: dict[str, list[Row]] = {}
    for result in results:
        if isinstance(result["rows"], dict):
            steps |= result["rows"]
        else:
            for row in result["rows"]:
                parts.setdefault(row["part"], []).append(row)
    found = []
    if steps:
        encoders = {name: row for name, row in steps.items() if name.startswith("encoder")}
        training = [(name, row) for name, row in steps.items() if name not in encoders]
        found += [
            targets.table(steps),
            table("row", TRAINING, training),
            table("encoder", ENCODERS, encoders.items()),
        ]
    for part, rows in parts.items():
        found.append(table(part, PARTS, [(row.get("variant", ""), row) for row in rows]))
    return found


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT.json")
    options = parser.parse_args()
    results = [json.loads(path.read_text().splitlines()[-1]) for path in options.results]
    print("\n\n".join(tables(results)))


if __name__ == "__main__":
    main()
