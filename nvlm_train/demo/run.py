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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from nvlm_train.demo.material import prepare_material
from nvlm_train.demo.report import write_before_after, write_report
from nvlm_train.demo.smollm2 import NUM_BEFORE, NUM_QUESTIONS, prepare_language_model
from nvlm_train.errors import ConfigError, TrainingError

logger = logging.getLogger(__name__)

_ACCURACY = {
    "vqa_accuracy": "easy-VQA accuracy, {} test questions",
    "vqa_accuracy_shuffled_images": "the same, images shuffled",
}
_BASELINES = {
    "vqa_question_only": "question-only baseline",
    "vqa_majority_answer": "majority answer",
}
_TEXT = {
    "text_loss": "text-only loss after SFT",
    "text_loss_backbone": "text-only loss of the backbone",
}
_WALL = {"wall_seconds": "wall seconds in all"}
_ROWS = {
    **{key: name.format("1,000") for key, name in _ACCURACY.items()},
    **_BASELINES,
    "page_cer_tiles": "character error on held-out pages, with tiles",
    "page_cer_thumbnail": "the same with the thumbnail only",
    **_TEXT,
    **_WALL,
}
_SMOLLM2_ROWS = {
    "vqa_accuracy_untrained": f"easy-VQA accuracy before training, {NUM_BEFORE} of the questions",
    **{key: name.format(NUM_QUESTIONS) for key, name in _ACCURACY.items()},
    **_BASELINES,
    **_TEXT,
    **_WALL,
}
_WANTED = {
    "vqa_accuracy": "at least 0.90",
    "vqa_accuracy_shuffled_images": "near question-only",
    "text_loss": "at most 1.02 x the next",
}


def _prepare(run_dir: Path) -> None:
    prepare_material(run_dir / "data")


def _prepare_smollm2(run_dir: Path) -> None:
    prepare_language_model(run_dir / "language_model")
    prepare_material(run_dir / "data", ("captions", "vqa", "chats"))


@dataclass(frozen=True)
class Demo:
    """One of the demos."""

    experiment: str
    """Its recipe, and its directory under runs/."""
    wanted: Mapping[str, str]
    """What its figures should be."""
    rows: Mapping[str, str]
    """Figures that are printed, and what they are called."""
    num_processes: int = 4
    judge: str = "nvlm_train.demo.judge"
    """The module that writes judgement.json."""
    prepare: Callable[[Path], None] = _prepare
    """Writes what training reads into the run directory."""
    write_report: Callable[[Path, str, dict[str, Any]], None] = write_report


DEMOS: Mapping[tuple[str, str], Demo] = {
    ("demo", "d"): Demo(
        "demo",
        _WANTED | {"page_cer_tiles": "at most half of the next", "wall_seconds": "at most 900"},
        _ROWS,
    ),
    # Two cores' minutes do not teach cross-attention to read pages (docs/demo.md).
    ("demo", "x"): Demo("demo_x", _WANTED | {"wall_seconds": "at most 1200"}, _ROWS),
    ("demo", "h"): Demo("demo_h", _WANTED | {"wall_seconds": "at most 1200"}, _ROWS),
    ("smollm2", "d"): Demo(
        "demo_smollm2",
        {"vqa_accuracy_shuffled_images": "below the one above", "wall_seconds": "at most 900"},
        _SMOLLM2_ROWS,
        num_processes=2,
        judge="nvlm_train.demo.before_after",
        prepare=_prepare_smollm2,
        write_report=write_before_after,
    ),
}
"""By language model and architecture."""


def run_demo(
    architecture: str, run_dir: str | None, overrides: Sequence[str], language: str = "demo"
) -> int:
    """Runs the parts that are missing and prints the figures.

    Args:
        architecture: d, x or h.
        run_dir: where everything is written; None for runs/ and the experiment's name.
        overrides: Hydra overrides of the experiment.
        language: the language model: `demo` is the small one that comes along.

    Raises:
        ConfigError: there is no such demo.
        TrainingError: one of the parts failed; its own message is above.
    """
    demo = DEMOS.get((language, architecture))
    if demo is None:
        known = ", ".join(kind for name, kind in DEMOS if name == language)
        raise ConfigError(
            [f"--architecture={architecture}: with --language={language} there is only {known}"]
        )
    directory = Path(run_dir or f"runs/{demo.experiment}")
    seconds: dict[str, float] = {}
    seconds["prepare_seconds"] = _timed(demo.prepare, directory)
    recipe = [f"experiment={demo.experiment}", *overrides]
    train = ("nvlm_train", "train", f"run_dir={directory}", *recipe)
    seconds["train_seconds"] = _timed(_launch, demo.num_processes, *train)
    judge = (demo.judge, "--run-dir", str(directory), *recipe)
    seconds["judge_wall_seconds"] = _timed(_launch, demo.num_processes, *judge)
    summary = json.loads((directory / "judgement.json").read_text()) | seconds
    summary["wall_seconds"] = sum(seconds.values())
    (directory / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    demo.write_report(directory, architecture, summary)
    _print(demo, architecture, summary, directory)
    return 0


def _timed(function: Any, *arguments: Any) -> float:
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


def _launch(num_processes: int, module: str, *arguments: str) -> None:
    """Starts processes with torchrun, with one thread each, because there may be only two cores."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={num_processes}", "-m", module, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    logger.info("%s", " ".join(command[1:]))
    code = subprocess.run(command, env=environment, check=False).returncode
    if code:
        raise TrainingError(f"{module} ended with code {code}; its message is above")


def _print(demo: Demo, architecture: str, summary: dict[str, Any], directory: Path) -> None:
    table = Table(title=f"NVLM-{architecture.upper()} demo")
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_column("wanted")
    for key, name in demo.rows.items():
        value = summary[key]
        shown = f"{value:.0f}" if key == "wall_seconds" else f"{value:.3f}"
        table.add_row(name, shown, demo.wanted.get(key, ""))
    console = Console()
    console.print(table)
    for example in summary.get("text_examples", ()):
        console.print(
            f"{example['question']}\n  before: {example['before']}\n  after: {example['answer']}",
            markup=False,
            highlight=False,
        )
    console.print(f"{directory}/summary.json and {directory}/report.html have the rest")
