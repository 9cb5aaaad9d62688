"""Whole runs of X and H: both stages, resumed, resharded; the Flamingo-style baseline resharded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.train import cross_text, runs
from tests.train.layouts import NO_DROPOUT, layout
from tests.train.resume.interrupted import WholeRun, assert_continues_bit_for_bit, stop
from tests.train.smoke import read_metrics
from tests.workers import WorkerPool

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("model", ["x", "h"])
@pytest.mark.parametrize("name", ["TP2 PP2", "single"])
def test_stopped_run_continues_bit_for_bit(
    workers: WorkerPool,
    data: Path,
    tmp_path: Path,
    whole_run: WholeRun,
    model: str,
    name: str,
) -> None:
    weights = assert_continues_bit_for_bit(
        workers, data, tmp_path, whole_run, name, 5, f"model=nvlm_{model}_smoke"
    )
    gates = [value for key, value in weights.items() if key.endswith("alpha")]
    assert len(gates) >= 2 and all(gate.abs() > 0 for gate in gates)


@pytest.mark.parametrize("model", ["x", "h", "flamingo"])
def test_resume_in_another_layout(
    workers: WorkerPool, data: Path, tmp_path: Path, whole_run: WholeRun, model: str
) -> None:
    chosen = f"model=nvlm_{model}_smoke"
    world, overrides = layout("TP2 PP2")
    workers.run(world, stop, data, tmp_path / "moved", 5, [*overrides, chosen, *NO_DROPOUT])
    world, overrides = layout("DP2")
    workers.run(world, runs.run, data, tmp_path / "moved", *overrides, chosen, *NO_DROPOUT)
    expected = read_metrics(whole_run("single", chosen, *NO_DROPOUT))
    found = read_metrics(tmp_path / "moved")
    assert [each["samples_hash"] for each in found] == [each["samples_hash"] for each in expected]
    assert [each["loss"] for each in found] == pytest.approx(
        [each["loss"] for each in expected], rel=1e-4
    )


@pytest.mark.parametrize("model", ["x", "h"])
def test_text_is_the_backbones_after_training_with_a_frozen_language_model(
    workers: WorkerPool, data: Path, whole_run: WholeRun, model: str
) -> None:
    """It holds bit for bit although the gates have opened, because text without images passes no gate."""
    chosen = (f"model=nvlm_{model}_smoke", "stages.sft.trainable=[projector,cross_attention]")
    run_dir = whole_run("TP2 PP2", *chosen)
    found, expected, smallest_gate = workers.run(
        1, cross_text.trained_and_backbone, data, run_dir, *chosen
    )[0]
    assert torch.equal(found, expected)
    assert smallest_gate > 0
