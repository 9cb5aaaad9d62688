"""metrics.jsonl through crashes and resumes, wandb offline, and what a person sees."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Literal

import pytest

from nvlm_train.config.schema import Recipe
from nvlm_train.recipe.load import load_recipe
from nvlm_train.train.tracking.announce import (
    NumberRow,
    PartRow,
    freeze_table,
    numbers_table,
    render,
)
from nvlm_train.train.tracking.metrics_log import MetricsLog, read_metrics
from nvlm_train.train.tracking.progress import summary
from nvlm_train.train.tracking.tracker import Tracker


def record(done: int, loss: float = 1.0, stage: str = "pretrain") -> dict[str, float | int | str]:
    return {"stage": stage, "step": done, "global_step": done, "loss": loss, "lr": 1e-4}


def steps(path: Path) -> list[int]:
    return [int(each["global_step"]) for each in read_metrics(path)]


def make_recipe(run_dir: Path, wandb: Literal["off", "offline", "online"] = "off") -> Recipe:
    recipe = load_recipe(["experiment=smoke"])
    tracking = dataclasses.replace(recipe.tracking, wandb=wandb)
    return dataclasses.replace(recipe, run_dir=str(run_dir), tracking=tracking)


def test_resume_drops_what_the_checkpoint_does_not_hold(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    for done in range(1, 6):
        log.append(record(done, loss=9.0))
    log.close()
    log = MetricsLog(tmp_path, 3)
    log.append(record(4, loss=1.0))
    log.close()
    assert steps(log.path) == [1, 2, 3, 4]
    assert [each["loss"] for each in read_metrics(log.path)] == [9.0, 9.0, 9.0, 1.0]


def test_a_torn_last_line_is_cut_off(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    log.append(record(1))
    log.close()
    with log.path.open("a") as file:
        file.write('{"stage": "pretrain", "step": 2, "global_st')
    assert steps(log.path) == [1]
    log = MetricsLog(tmp_path, 5)
    log.append(record(2))
    log.close()
    assert steps(log.path) == [1, 2]
    assert log.path.read_bytes().count(b"\n") == 2


def test_lines_are_on_disk_before_close(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    log.append(record(1))
    assert steps(log.path) == [1]
    log.close()


def test_a_run_without_a_checkpoint_starts_over(tmp_path: Path) -> None:
    for _ in range(2):
        log = MetricsLog(tmp_path, 0)
        log.append(record(1))
        log.close()
    assert steps(log.path) == [1]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with Tracker(make_recipe(tmp_path / "run"), "abc", 0, rank=1) as tracker:
        tracker.log(record(1))
        assert tracker.run_id == "abc"
    assert not (tmp_path / "run").exists()


def test_without_wandb_there_is_no_run_id(tmp_path: Path) -> None:
    with Tracker(make_recipe(tmp_path), None, 0, rank=0) as tracker:
        tracker.log(record(1))
        assert tracker.run_id is None
    assert steps(tmp_path / "metrics.jsonl") == [1]
    assert not (tmp_path / "wandb").exists()


def test_plain_lines_in_a_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.INFO, logger="nvlm_train"),
        Tracker(make_recipe(tmp_path), None, 0, rank=0) as tracker,
    ):
        tracker.log(record(3))
    assert "pretrain step 3 loss 1.0000 lr 1.00e-04 (3/8)" in caplog.text


def test_skipped_samples_show() -> None:
    assert summary({**record(1), "skipped_samples": 2}).endswith("skipped 2")
    assert "skipped" not in summary({**record(1), "skipped_samples": 0})


def test_freeze_table_names_states_rates_and_the_total() -> None:
    rows = [PartRow("vision_encoder", 3000, False), PartRow("projector", 1000, True, 1e-4)]
    lines = render(freeze_table("pretrain", rows)).splitlines()
    (encoder,) = (line for line in lines if "vision_encoder" in line)
    (projector,) = (line for line in lines if "projector" in line)
    assert "3,000" in encoder and "frozen" in encoder and "1.00e-04" not in encoder
    assert "trainable" in projector and "1.00e-04" in projector
    assert any("4,000" in line and "25.0% trainable" in line for line in lines)


def test_numbers_table_says_how() -> None:
    text = render(numbers_table("sft", [NumberRow("tokens per tile", "4", "(32 / 8 / 2)^2")]))
    assert "tokens per tile" in text and "(32 / 8 / 2)^2" in text
