"""`nvlm compare` on metrics files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nvlm_train.cli import main
from nvlm_train.cli.compare import figures


def write_run(directory: Path, tokens: int) -> None:
    directory.mkdir()
    records = [
        {
            "stage": stage, "step": step, "global_step": step, "loss": 1.0 / step, "samples": 4,
            "tokens": tokens, "tiles": 8, "seconds": 2.0 * step, "peak_memory_gib": 1.5,
        }
        for stage in ("pretrain", "sft")
        for step in (1, 2, 3)
    ]  # fmt: skip
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (directory / "metrics.jsonl").write_text(lines)


def test_figures_are_the_last_stages(tmp_path: Path) -> None:
    write_run(tmp_path / "d", tokens=100)
    shown = figures(tmp_path / "d")
    assert shown["last stage"] == "sft, 3 steps"
    assert shown["seconds a step, median"] == "4.000"
    assert shown["samples a second"] == "1.00"
    assert shown["decoder tokens a sample"] == "25.0"
    assert shown["tiles a sample"] == "2.00"
    assert "easy-VQA accuracy" not in shown


def test_runs_stand_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, tokens in (("d", 100), ("x", 40)):
        write_run(tmp_path / name, tokens)
    (tmp_path / "x" / "summary.json").write_text(json.dumps({"vqa_accuracy": 0.91}))
    assert main(["compare", str(tmp_path / "d"), str(tmp_path / "x")]) == 0
    printed = capsys.readouterr().out
    for text in ("25.0", "10.0", "0.910", " d ", " x "):
        assert text in printed


def test_a_directory_without_metrics_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(tmp_path)]) == 2
    assert f"run_dir={tmp_path} has no metrics.jsonl" in capsys.readouterr().err
