"""Nothing that is not finite is kept: not in a checkpoint, not at a stage's start."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.train import runs
from tests.train.checkpoint import saves
from tests.train.health import ills
from tests.train.layouts import layout
from tests.train.smoke import read_metrics
from tests.workers import WorkerPool

WholeRun = Callable[..., Path]
ONE_STAGE = ("schedule=[sft]", "checkpoint.interval_steps=2", "checkpoint.keep_last=9")
STEPS = 4


def checkpoints(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param("weights", "DP2", marks=pytest.mark.slow),
        pytest.param("exp_avg_sq", "DP2", marks=pytest.mark.slow),
        pytest.param("exp_avg", "PP2", marks=pytest.mark.slow),
        pytest.param("weights", "TP2", marks=pytest.mark.slow),
    ],
)
def test_no_such_checkpoint_is_published(
    workers: WorkerPool, data: Path, tmp_path: Path, whole_run: WholeRun, kind: str, name: str
) -> None:
    """It happens on one rank, in the last step before the last save. Then the run goes on as usual."""
    world, parallel = layout(name)
    overrides, run_dir = (*parallel, *ONE_STAGE), tmp_path / "run"
    arguments = (data, run_dir, world - 1, kind, STEPS, *overrides)
    messages = workers.run(world, ills.spoilt_optimizer, *arguments)
    assert len(set(messages)) == 1, "every rank ends alike"
    assert "stage=sft step=4: no checkpoint is saved: not finite: " in messages[0]
    assert "the newest complete one is sft-00000002" in messages[0]
    assert "stages.sft.optimizer.lr=" in messages[0]
    assert checkpoints(run_dir) == ["sft-00000002"]
    assert workers.run(world, runs.run, data, run_dir, *overrides) == [0] * world
    assert read_metrics(run_dir) == read_metrics(whole_run(name, *ONE_STAGE))


def test_one_that_was_published_before_is_passed_over(
    workers: WorkerPool, data: Path, tmp_path: Path, whole_run: WholeRun
) -> None:
    run_dir = tmp_path / "run"
    assert workers.run(1, ills.published, data, run_dir, "weights", STEPS, *ONE_STAGE) == [0]
    found = workers.run(1, saves.damage_of, run_dir / "checkpoints" / "sft-00000004")[0]
    assert len(found) == 1 and "are not finite: their magnitudes add up to nan" in found[0]
    assert workers.run(1, runs.run, data, run_dir, *ONE_STAGE) == [0]
    assert checkpoints(run_dir) == ["damaged-sft-00000004", "sft-00000002", "sft-00000004"]
    assert read_metrics(run_dir) == read_metrics(whole_run("single", *ONE_STAGE))


def test_moments_that_were_published_before_are_named(
    workers: WorkerPool, data: Path, tmp_path: Path
) -> None:
    """A checkpoint's own sums are of weights only, so the moments are checked once it has been loaded."""
    run_dir = tmp_path / "run"
    overrides = (*ONE_STAGE, "stages.sft.steps=2", "stages.sft.optimizer.warmup_steps=1")
    assert workers.run(1, ills.published, data, run_dir, "exp_avg_sq", 2, *overrides) == [0]
    message = workers.run(1, ills.attempt, data, run_dir, *ONE_STAGE)[0]
    saved = run_dir / "checkpoints" / "sft-00000002"
    assert "cannot start at step 2: not finite: exp_avg_sq of the optimizer" in message
    assert f"remove {saved}" in message
    shutil.rmtree(saved)
    assert workers.run(1, ills.attempt, data, run_dir, *ONE_STAGE) == [0]


def test_a_run_does_not_begin_with_such_weights(
    workers: WorkerPool, data: Path, tmp_path: Path
) -> None:
    overrides = (*ONE_STAGE, "model.language.init_std=1e39")
    message = workers.run(1, ills.attempt, data, tmp_path / "run", *overrides)[0]
    assert "cannot start at step 0: not finite: " in message and "init_std" in message


@pytest.mark.parametrize("optimizer", ["true", pytest.param("false", marks=pytest.mark.slow)])
def test_a_save_comes_before_the_first_finite_step(
    workers: WorkerPool, data: Path, tmp_path: Path, optimizer: str
) -> None:
    overrides = (
        *ONE_STAGE,
        "checkpoint.interval_steps=1",
        f"stages.sft.parallel.distributed_optimizer={optimizer}",
    )
    run_dir = tmp_path / "run"
    arguments = (data, run_dir, 0, (1,), *overrides)
    assert workers.run(1, ills.not_a_number, *arguments) == [0]
    assert checkpoints(run_dir)[0] == "sft-00000001"
    shutil.rmtree(run_dir / "checkpoints" / "sft-00000004")
    shutil.rmtree(run_dir / "checkpoints" / "sft-00000003")
    shutil.rmtree(run_dir / "checkpoints" / "sft-00000002")
    before = read_metrics(run_dir)
    assert workers.run(1, runs.run, data, run_dir, *overrides) == [0]
    assert read_metrics(run_dir)[1:] == before[1:]


def test_an_encoder_with_such_weights_is_named(
    workers: WorkerPool, data: Path, tmp_path: Path
) -> None:
    message = workers.run(1, ills.broken_encoder, data, tmp_path / "run", *ONE_STAGE)[0]
    assert (
        "not finite: vision_encoder.encoder.layer.0.lambda_1; they lie in model.vision." in message
    )
