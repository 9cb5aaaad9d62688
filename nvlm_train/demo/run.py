"""`nvlm demo`: makes shards, trains both stages with torchrun, judges the run, writes a report.

Each part is skipped when the run directory already has it, so an interrupted demo goes on.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from nvlm_train.demo.material import prepare_material
from nvlm_train.demo.report import write_report
from nvlm_train.errors import TrainingError

logger = logging.getLogger(__name__)

NUM_PROCESSES = 4
_ROWS = {
    "vqa_accuracy": "easy-VQA accuracy, 1,000 test questions",
    "vqa_accuracy_shuffled_images": "the same, images shuffled",
    "vqa_question_only": "question-only baseline",
    "vqa_majority_answer": "majority answer",
    "page_cer_tiles": "character error on held-out pages, with tiles",
    "page_cer_thumbnail": "the same with the thumbnail only",
    "text_loss": "text-only loss after SFT",
    "text_loss_backbone": "text-only loss of the backbone",
    "wall_seconds": "wall seconds in all",
}
_WANTED = {
    "vqa_accuracy": "at least 0.90",
    "vqa_accuracy_shuffled_images": "near question-only",
    "text_loss": "at most 1.02 x the next",
}
_WANTED_OF = {
    "d": _WANTED | {"page_cer_tiles": "at most half of the next", "wall_seconds": "at most 900"},
    # Two cores' minutes do not teach cross-attention to read pages (docs/demo.md).
    "x": _WANTED | {"wall_seconds": "at most 1200"},
    "h": _WANTED | {"wall_seconds": "at most 1200"},
}

EXPERIMENTS = {"d": "demo", "x": "demo_x", "h": "demo_h"}
"""Architecture -> recipe."""


def run_demo(architecture: str, run_dir: str | None, overrides: Sequence[str]) -> int:
    """Runs the parts that are missing and prints the figures.

    Args:
        architecture: a key of `EXPERIMENTS`.
        run_dir: where everything is written; None for runs/ and the experiment's name.
        overrides: Hydra overrides of the experiment.

    Raises:
        TrainingError: one of the parts failed; its own message is above.
    """
    experiment = EXPERIMENTS[architecture]
    directory = Path(run_dir or f"runs/{experiment}")
    seconds: dict[str, float] = {}
    seconds["prepare_seconds"] = _timed(prepare_material, directory / "data")
    recipe = [f"experiment={experiment}", *overrides]
    train = ("nvlm_train", "train", f"run_dir={directory}", *recipe)
    seconds["train_seconds"] = _timed(_launch, *train)
    judge = ("nvlm_train.demo.judge", "--run-dir", str(directory), *recipe)
    seconds["judge_wall_seconds"] = _timed(_launch, *judge)
    summary = json.loads((directory / "judgement.json").read_text()) | seconds
    summary["wall_seconds"] = sum(seconds.values())
    (directory / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    write_report(directory, architecture, summary)
    _print(architecture, summary, directory)
    return 0


def _timed(function: Any, *arguments: Any) -> float:
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


def _launch(module: str, *arguments: str) -> None:
    """Starts four processes with torchrun, with one thread each, because there may be only two cores."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={NUM_PROCESSES}", "-m", module, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    logger.info("%s", " ".join(command[1:]))
    code = subprocess.run(command, env=environment, check=False).returncode
    if code:
        raise TrainingError(f"{module} ended with code {code}; its message is above")


def _print(architecture: str, summary: dict[str, Any], directory: Path) -> None:
    table = Table(title=f"NVLM-{architecture.upper()} demo")
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_column("wanted")
    for key, name in _ROWS.items():
        value = summary[key]
        shown = f"{value:.0f}" if key == "wall_seconds" else f"{value:.3f}"
        table.add_row(name, shown, _WANTED_OF[architecture].get(key, ""))
    console = Console()
    console.print(table)
    console.print(f"{directory}/summary.json and {directory}/report.html have the rest")
