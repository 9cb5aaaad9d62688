"""Answers during training: in every layout, in wandb with their tiles, and without an effect on the run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.train import runs
from tests.train.layouts import layout
from tests.train.smoke import read_metrics
from tests.train.tracking.test_wandb_run import parts, records
from tests.workers import WorkerPool

EXAMPLES = [
    "tracking.wandb=offline", "tracking.examples_every=2",
    "tracking.num_examples=3", "tracking.example_tokens=4",
]  # fmt: skip


def check(workers: WorkerPool, data: Path, run_dir: Path, name: str, whole: Path) -> None:
    world, parallel = layout(name)
    codes = workers.run(world, runs.run, data, run_dir, *parallel, *EXAMPLES)
    assert codes == [0] * world
    assert read_metrics(run_dir) == read_metrics(whole), "examples changed the run"
    (path,) = parts(run_dir)
    tables = [each["artifact"] for each in records(path) if each["type"] == "artifact"]
    # Steps 2 and 4 of both stages; the last step of a stage counts once.
    assert len(tables) == 4
    files = {each["path"]: Path(each["local_path"]) for each in tables[0]["manifest"]["contents"]}
    # Beside the run, so that another machine can upload it, and not in this one's home.
    assert all(run_dir in file.parents and file.exists() for file in files.values())
    (table,) = (file for name, file in files.items() if name.endswith(".table.json"))
    content = json.loads(table.read_text())
    assert content["columns"][:5] == ["source", "sample", "question", "reference", "answer"]
    assert len(content["data"]) == 3
    for row in content["data"]:
        assert row[0] in ("captions", "vqa") and row[3]
        assert files[row[5]["path"]].stat().st_size > 0


@pytest.mark.slow
def test_examples_leave_no_trace(
    workers: WorkerPool, data: Path, tmp_path: Path, whole_run: Callable[..., Path]
) -> None:
    check(workers, data, tmp_path / "run", "single", whole_run("single"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TP2 PP2", "PP2 DP2"])
def test_examples_in_a_layout(
    workers: WorkerPool, data: Path, tmp_path: Path, whole_run: Callable[..., Path], name: str
) -> None:
    check(workers, data, tmp_path / "run", name, whole_run(name))
