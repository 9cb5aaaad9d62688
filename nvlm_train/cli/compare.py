"""`nvlm compare`: shows runs side by side, such as the demo's D, X and H."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from nvlm_train.errors import NvlmError
from nvlm_train.train.tracking.metrics_log import FILE_NAME, read_metrics

_JUDGED = {
    "vqa_accuracy": "easy-VQA accuracy",
    "page_cer_tiles": "character error with tiles",
    "text_loss_ratio": "text loss over the backbone's",
}
"""Key of a demo's summary.json -> how it is shown."""


def compare(run_dirs: Sequence[str]) -> int:
    """Prints a table of what the last stage of each run measured, with one column per run.

    Raises:
        NvlmError: a directory has no metrics.
    """
    columns = {directory: figures(Path(directory)) for directory in run_dirs}
    table = Table(title="runs side by side")
    table.add_column("figure")
    for directory in columns:
        table.add_column(Path(directory).name, justify="right")
    for name in dict.fromkeys(name for column in columns.values() for name in column):
        table.add_row(name, *(column.get(name, "-") for column in columns.values()))
    Console().print(table)
    return 0


def figures(run_dir: Path) -> dict[str, str]:
    """Returns a run's figures by name, ready to be shown.

    Raises:
        NvlmError: the directory has no metrics.
    """
    path = run_dir / FILE_NAME
    if not path.is_file():
        raise NvlmError(f"run_dir={run_dir} has no {FILE_NAME}; name directories of runs")
    records = list(read_metrics(path))
    if not records:
        raise NvlmError(f"{path} is empty: the run has not made a step yet")
    last = [record for record in records if record["stage"] == records[-1]["stage"]]
    tokens, samples, tiles = (
        sum(int(r[key]) for r in last) for key in ("tokens", "samples", "tiles")
    )
    seconds = statistics.median(float(record["seconds"]) for record in last)
    shown = {
        "last stage": f"{last[-1]['stage']}, {last[-1]['step']} steps",
        "loss, mean of the last 10 steps": f"{statistics.fmean(float(r['loss']) for r in last[-10:]):.4f}",
        "seconds a step, median": f"{seconds:.3f}",
        "samples a second": f"{samples / len(last) / seconds:.2f}",
        "decoder tokens a sample": f"{tokens / samples:.1f}",
        "tiles a sample": f"{tiles / samples:.2f}",
        "peak memory of rank 0, GiB": f"{max(float(r['peak_memory_gib']) for r in last):.2f}",
    }
    summary = run_dir / "summary.json"
    if summary.is_file():
        judged: dict[str, Any] = json.loads(summary.read_text())
        shown |= {name: f"{judged[key]:.3f}" for key, name in _JUDGED.items() if key in judged}
    return shown
