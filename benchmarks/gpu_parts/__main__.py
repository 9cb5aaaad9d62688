"""What a step's parts cost on this GPU, each in the ways there are to compute it.

    python -m benchmarks.gpu_parts
    python -m benchmarks.gpu_parts --parts rope attention
    python -m benchmarks.gpu_parts --toy        # the variants that a CPU has, tiny

Qwen2.5-1.5B's layer at a pack of 8,192 tokens of the benchmarks' plan (benchmarks/gpu/packs.py), InternViT's
layers at several batch sizes. `ms` lies between two events with several calls in flight: what the
host takes counts where the device waits for it. `gpu_ms`, `kernels`, `launches` and
`synchronisations` are of one traced call. `error` is the worst relative distance of outputs and
gradients from fp32. The last line is one JSON object; rows appear on the error stream.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.gpu.activity import KERNEL_FAILURES, describe_device, free_memory
from benchmarks.gpu.shapes import ENCODERS, LARGE, TOY, Sizes
from benchmarks.gpu_parts.attention import attention_rows, rope_rows
from benchmarks.gpu_parts.cross import cross_rows
from benchmarks.gpu_parts.encoder import encoder_rows
from benchmarks.gpu_parts.layer import TORCH_ONLY, elementwise_rows, layer_config, layer_rows
from benchmarks.gpu_parts.linear import (
    loss_rows,
    optimizer_rows,
    product_rows,
    weight_gradient_rows,
)
from benchmarks.gpu_parts.recompute import recompute_rows
from benchmarks.gpu_parts.variants import Row, Timing
from nvlm_train.config.schema import ParallelConfig
from nvlm_train.parallel.topology import build_topology, process_group


def parts_of(sizes: Sizes, timing: Timing) -> dict[str, Callable[[], list[Row]]]:
    """Every part by its name, the quick ones first."""
    config = layer_config(sizes, TORCH_ONLY)
    is_toy = sizes == TOY
    short = replace(timing, repeats=max(2, timing.repeats // 2), warm_up=2)
    small = ENCODERS["toy" if is_toy else "300m"]
    large = ENCODERS["toy" if is_toy else "6b"]
    batches = (2,) if is_toy else (16, 8, 32, 64)
    return {
        "products": lambda: product_rows(sizes, timing),
        "layer": lambda: layer_rows(sizes, timing),
        "recompute": lambda: recompute_rows(sizes, timing),
        "rope": lambda: rope_rows(sizes, config, timing),
        "attention": lambda: attention_rows(sizes, config, timing),
        "cross_attention": lambda: cross_rows(sizes, config, timing),
        "weight_gradient": lambda: weight_gradient_rows(sizes, timing),
        "loss": lambda: loss_rows(sizes, short),
        "elementwise": lambda: elementwise_rows(sizes, timing),
        "optimizer": lambda: optimizer_rows(10_000 if is_toy else 400_000_000, short),
        "encoder_300m": lambda: encoder_rows("300m", small, 2 if is_toy else 8, batches, short),
        "encoder_6b": lambda: encoder_rows("6b", large, 2 if is_toy else 3, batches, short),
    }


def measure(name: str, make_rows: Callable[[], list[Row]]) -> list[Row]:
    """A part's rows; one that says what was raised where its reference failed, or memory ran out."""
    try:
        return make_rows()
    except KERNEL_FAILURES as error:
        row: Row = {"part": name, "failed": f"{type(error).__name__}: {str(error)[:300]}"}
        print(json.dumps(row), file=sys.stderr, flush=True)
        return [row]
    finally:
        free_memory()


def main() -> int:
    """Measures and prints; exit code 1 when a variant failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--toy", action="store_true", help="toy sizes, on a CPU")
    parser.add_argument("--parts", nargs="+", metavar="PART", help="these parts alone")
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    sizes = TOY if options.toy else LARGE
    with process_group():
        build_topology(ParallelConfig(), seed=0)
        torch.manual_seed(0)
        parts = parts_of(sizes, Timing(repeats=options.repeats))
        names = options.parts or list(parts)
        if unknown := sorted(set(names) - set(parts)):
            parser.error(f"--parts {' '.join(unknown)}: there are {' '.join(parts)}")
        rows = [row for name in names for row in measure(name, parts[name])]
    print(json.dumps(describe_device() | {"rows": rows}))
    return 1 if any("failed" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
