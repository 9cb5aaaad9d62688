"""Training on one GPU: this trainer, transformers' InternVL on the same shapes, and the encoders.

    python -m benchmarks.gpu                    # under four minutes on an H100 or H200
    python -m benchmarks.gpu --judged           # the rows that gpu/targets.py asks for, stage 1 too
    python -m benchmarks.gpu --full             # more rows
    python -m benchmarks.gpu --rows d --trace DIRECTORY
    python -m benchmarks.gpu --toy              # a toy on a CPU, to see that it runs

Qwen2.5-1.5B's shape with untied tables (1.78 B) and InternViT-300M's, random weights, bf16, packs of
8,192 tokens. The samples, of 1 to 7 tiles and mixed text lengths, are the same in every row
(packs.py), and everything but the encoder trains unless a row says otherwise. A row's MFU is of
the FLOPs that the model needs (`costs.step_flops`: frozen parts forward only, logits at trained
tokens only, the encoder's forward pass included, no padding) against 989 TFLOP/s. `d_shards` is `d` again
with the samples in WebDataset tars of JPEGs, which the loader reads, decodes and tiles while training runs.
The last line of the output is one JSON object; rows appear on the error stream as they are ready, and what
is asked of them at its end.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu import targets
from benchmarks.gpu.activity import KERNEL_FAILURES, describe_device, free_memory
from benchmarks.gpu.packs import digest, make_plan
from benchmarks.gpu.reference import reference_row
from benchmarks.gpu.rows import Repeats, Row, TrainingRow, encoder_row, training_row
from benchmarks.gpu.shapes import ENCODERS, LARGE, PRETRAIN, TOY, Sizes
from benchmarks.gpu.shards import shards_row
from nvlm_train.parallel import kernels
from nvlm_train.parallel.topology import collect_engines, process_group

MakeRow = Callable[[Path | None], Row]

DEFAULT = ("d", "x", "h", "text", "transformers", "encoder_300m", "encoder_6b")


def rows_of(sizes: Sizes, repeats: Repeats) -> dict[str, MakeRow]:
    """Every row by its name."""
    found = kernels.detect()
    plain: Any = "torch_varlen" if found.attention == "transformer_engine" else found.attention
    torch_only = replace(found, linear="megatron", attention=plain, norm="torch")
    three = replace(sizes, language="toy" if sizes == TOY else "3b")

    def encoder(name: str, tiles: int) -> MakeRow:
        vision = ENCODERS["toy" if sizes == TOY else name]
        return partial(encoder_row, vision, 8 if sizes == TOY else tiles, repeats)

    training = {
        "d": TrainingRow("d", sizes, found),
        "x": TrainingRow("x", sizes, found),
        "h": TrainingRow("h", sizes, found),
        "text": TrainingRow("d", sizes, found, has_images=False),
        "d_stage_1": TrainingRow("d", sizes, found, PRETRAIN),
        "d_torch": TrainingRow("d", sizes, torch_only),
        "x_torch": TrainingRow("x", sizes, torch_only),
        "h_torch": TrainingRow("h", sizes, torch_only),
        "text_torch": TrainingRow("d", sizes, torch_only, has_images=False),
        "d_3b": TrainingRow("d", three, found),
    }
    rows: dict[str, MakeRow] = {
        name: partial(training_row, row, repeats) for name, row in training.items()
    }
    rows["d_shards"] = partial(shards_row, training["d"], repeats)
    rows["transformers"] = partial(reference_row, sizes, repeats)
    rows["encoder_300m"] = encoder("300m", tiles=160)
    rows["encoder_6b"] = encoder("6b", tiles=48)
    return rows


def measure(rows: dict[str, MakeRow], names: Sequence[str], traces: Path | None) -> dict[str, Row]:
    """Each row, or what its kernels raised."""
    found: dict[str, Row] = {}
    for name in names:
        started = time.perf_counter()
        try:
            row = rows[name](traces / f"{name}.json" if traces else None)
        except KERNEL_FAILURES as error:
            row = {"error": f"{type(error).__name__}: {str(error)[:400]}"}
        collect_engines()
        free_memory()
        found[name] = row | {"row_seconds": round(time.perf_counter() - started, 1)}
        print(json.dumps({name: found[name]}), file=sys.stderr, flush=True)
    return found


def commit() -> str | None:
    """Of the checkout that this is, with a plus where files differ from it; none outside of one."""
    command = ["git", "describe", "--always", "--abbrev=7", "--exclude=*", "--dirty=+"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def main() -> int:
    """Measures and prints; exit code 1 when a row failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--toy", action="store_true", help="toy sizes")
    parser.add_argument("--full", action="store_true", help="all rows")
    parser.add_argument("--judged", action="store_true", help="rows that answer the targets")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="these rows alone")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warm-up", type=int, default=1, help="steps after the first")
    parser.add_argument("--trace", type=Path, metavar="DIRECTORY", help="keep Chrome traces there")
    options = parser.parse_args()
    sizes = TOY if options.toy else LARGE
    rows = rows_of(sizes, Repeats(options.warm_up, options.repeats))
    names = options.rows or (
        list(rows) if options.full else targets.ROWS if options.judged else DEFAULT
    )
    if unknown := sorted(set(names) - set(rows)):
        parser.error(f"--rows {' '.join(unknown)}: there are {' '.join(rows)}")
    with process_group():
        found = measure(rows, names, options.trace)
    plan = make_plan(sizes)
    result = describe_device() | {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "plan": digest(plan),
        "pack_length": sizes.pack_length,
        "rows": found,
    }
    print(targets.table(found), file=sys.stderr)
    print(json.dumps(result))
    return 1 if any("error" in row for row in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
