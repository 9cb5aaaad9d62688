"""Writes the tables of docs/performance.md from benchmarks/results/*.json. Imports no torch.

python docs/reference/performance_tables.py

gpu.json is the output of `python -m benchmarks.gpu`; cpu.json has, for each benchmark that runs on a CPU, the
output (`figures`), when it was made and on what. Nothing here is a number of its own but what is asked and
the limits that follow from arithmetic elsewhere, whose place is named.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
COMMAND = "python docs/reference/performance_tables.py"

sys.path.insert(0, str(ROOT))
from benchmarks.gpu import targets  # noqa: E402

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Figure:
    """One line of the table of a CPU's figures."""

    title: str
    benchmark: str
    """Its name in cpu.json: the script is `benchmarks/NAME.py`."""
    place: tuple[str, ...]
    """Where the number is in the output."""
    asked: str = ""
    limit: str = ""
    """What arithmetic or another measurement allows at most."""


FIGURES = (
    Figure(
        "step at TP2 over megatron-core's LLaVAModel with local layers, CPU seconds",
        "llava", ("cpu", "ratio"), asked="at least 1.5",
    ),
    Figure(
        "the same, wall seconds", "llava", ("wall", "ratio"), asked="at least 1.5",
    ),
    Figure(
        "a step of D over that of commit b4d27e3, CPU seconds", "before", ("d", "cpu", "ratio"),
        asked="at least 1",
    ),
    Figure(
        "the same of X", "before", ("x", "cpu", "ratio"), asked="at least 1",
    ),
    Figure(
        "the same of D at TP2 x PP2", "before", ("d_tp2_pp2", "cpu", "ratio"), asked="at least 1",
    ),
    Figure(
        "tokens a second over transformers' InternVL, fp32", "step_time", ("fp32_ratio",),
        limit="1.49 by products alone",
    ),
    Figure(
        "the same, bf16 products made of fp32 ones", "step_time", ("bf16_ratio",),
        limit="1.49 by products alone",
    ),
    Figure(
        "X, samples a second over D's", "architectures", ("x_over_d",), asked="1.76 (NVLM 1.0, Table 3)"
    ),
    Figure(
        "H, samples a second over D's", "architectures", ("h_over_d",), asked="1.26 (NVLM 1.0, Table 3)"
    ),
    Figure(
        "a photo to tiles over Pillow's way", "images", ("photo_ratio",), asked="at least 2.5",
        limit="6.4, decoding alone",
    ),
    Figure(
        "a document to tiles over Pillow's way", "images", ("document_ratio",), asked="at least 2.5",
        limit="6.8, decoding alone",
    ),
    Figure(
        "samples a second over webdataset's, same decoder", "loader", ("same_ratio_to_webdataset",),
        limit="1.10, offsets known beforehand",
    ),
    Figure(
        "the same with a background worker", "loader", ("same_worker_ratio_to_webdataset",),
    ),
    Figure(
        "steps that a checkpoint costs", "checkpoint_stall", ("stall_steps_per_save",), limit="0",
    ),
)  # fmt: skip


def read(name: str) -> Result:
    """Reads a file of results; the last line of a benchmark's output is JSON."""
    text = (RESULTS / name).read_text(encoding="utf-8")
    result: Result = json.loads(text if name == "cpu.json" else text.splitlines()[-1])
    return result


def origin(result: Result) -> str:
    """Says what a GPU's figures are of, and whether newer ones wait for a GPU."""
    commit = result["commit"]
    waiting = "benchmarks.gpu " in (RESULTS / "PENDING.md").read_text(encoding="utf-8")
    text = (
        f"One {result['device']}, {result['date']}, torch {result['torch']}, megatron-core "
        f"{result['megatron-core']}, commit {commit}."
    )
    if waiting:
        text += (
            f" **They are figures of commit {commit}, not of the code as it is now**: what was built since "
            "(packs placed ahead, one kernel where there were thirty, the compiled encoder, overlap) has not "
            "been measured on a GPU. `benchmarks/results/PENDING.md` holds the commands that do it."
        )
    return textwrap.fill(text, 118, break_long_words=False, break_on_hyphens=False)


def gpu_rows(rows: Mapping[str, Result]) -> Iterator[str]:
    """Each row's speed beside what it would be if the card did nothing but its products, at its peak."""
    yield line("row", "a second", "at the card's peak", "MFU", "GPU busy", "peak GiB, predicted")
    yield line(*["---"] * 6)
    for name, row in rows.items():
        if "error" in row:
            yield line(f"`{name}`", "failed", *["-"] * 4)
            continue
        unit = "tiles" if name.startswith("encoder") else "tokens"
        speed, mfu = row[f"{unit}_per_s"], row["mfu"]
        memory = f"{row['peak_gib']:.1f}, {row['predicted_gib']:.1f}"
        yield line(
            f"`{name}`", f"{speed:,.0f} {unit}", f"{speed / mfu:,.0f}", f"{mfu:.1%}",
            f"{row['busy']:.0%}", memory,
        )  # fmt: skip


def cpu_rows(results: Mapping[str, Result]) -> Iterator[str]:
    """Each figure beside what was asked, its limit, and the script."""
    yield line("figure", "measured", "asked", "limit", "script", "when, on what")
    yield line(*["---"] * 6)
    for figure in FIGURES:
        result = results[figure.benchmark]
        value: Any = result["figures"]
        for key in figure.place:
            value = value[key]
        script = f"[`benchmarks/{figure.benchmark}.py`](../benchmarks/results/{result['page']})"
        made = f"{result['date']}, {result['machine']}"
        yield line(
            figure.title, f"{value:.2f}", figure.asked or "-", figure.limit or "-", script, made
        )


def line(*cells: str) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"


def tables() -> dict[str, str]:
    """What stands between the marks of the page, by the marks' names."""
    gpu = read("gpu.json")
    return {
        "targets": f"{origin(gpu)}\n\n{targets.table(gpu['rows'])}",
        "gpu": "\n".join(gpu_rows(gpu["rows"])),
        "cpu": "\n".join(cpu_rows(read("cpu.json"))),
    }


def begin(name: str) -> str:
    """The mark in front of a table."""
    return f"<!-- {name}: {COMMAND} -->"


END = "<!-- end -->"


def replaced(page: str, contents: Mapping[str, str]) -> str:
    """Puts each table between its marks."""
    for name, content in contents.items():
        head, rest = page.split(begin(name))
        page = f"{head}{begin(name)}\n{content}\n{END}{rest.split(END, 1)[1]}"
    return page


if __name__ == "__main__":
    PAGE.write_text(replaced(PAGE.read_text(encoding="utf-8"), tables()), encoding="utf-8")
