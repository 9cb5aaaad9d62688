"""Whole runs with packs longer than samples: the same samples and losses, other layouts, stop and go on."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from nvlm_train.errors import CheckpointError
from tests.train import runs
from tests.train.layouts import NO_DROPOUT, layout
from tests.train.resume.interrupted import WholeRun, assert_continues_bit_for_bit, stop
from tests.train.smoke import read_metrics
from tests.workers import WorkerPool

SAMPLES = ("stages.pretrain.batch.size=12", "stages.sft.batch.size=12", *NO_DROPOUT)
LONGER = (*SAMPLES, "stages.pretrain.pack_length=512", "stages.sft.pack_length=320")
"""The stages hand over although their packs differ."""
SAME = ("samples_hash", "samples", "tokens", "tiles", "trained_tokens")


def assert_same_steps(found: Path, expected: Path) -> None:
    one, other = read_metrics(found), read_metrics(expected)
    for key in SAME:
        assert [each[key] for each in one] == [each[key] for each in other], key
    losses = [[each["loss"] for each in records] for records in (one, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("name", ["single", pytest.param("TP2 PP2", marks=pytest.mark.slow)])
def test_longer_packs_train_on_the_same_samples(whole_run: WholeRun, name: str) -> None:
    assert_same_steps(whole_run(name, *LONGER), whole_run("single", *SAMPLES))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["x", "h"])
def test_x_and_h_do_as_well(whole_run: WholeRun, model: str) -> None:
    chosen = f"model=nvlm_{model}_smoke"
    assert_same_steps(whole_run("TP2 PP2", *LONGER, chosen), whole_run("single", *SAMPLES, chosen))


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit_and_elsewhere(
    workers: WorkerPool, data: Path, tmp_path: Path, whole_run: WholeRun
) -> None:
    assert_continues_bit_for_bit(workers, data, tmp_path / "same", whole_run, "TP2 PP2", 5, *LONGER)
    world, parallel = layout("TP2 PP2")
    workers.run(world, stop, data, tmp_path / "moved", 5, [*parallel, *LONGER])
    world, parallel = layout("DP2")
    workers.run(world, runs.run, data, tmp_path / "moved", *parallel, *LONGER)
    assert_same_steps(tmp_path / "moved", whole_run("single", *LONGER))


@pytest.mark.slow
def test_a_half_done_stage_keeps_its_packs(workers: WorkerPool, data: Path, tmp_path: Path) -> None:
    workers.run(1, stop, data, tmp_path, 1, [*LONGER])
    code, messages = workers.run(1, outcome, data, tmp_path, *SAMPLES)[0]
    assert code != 0 and "stages.pretrain.pack_length=None, was 512" in messages


def outcome(data: Path, run_dir: Path, *overrides: str) -> tuple[int, str]:
    """Runs on the workers: how a run ends, and what it says."""
    try:
        return runs.run(data, run_dir, *overrides), ""
    except CheckpointError as error:
        return 2, str(error)


def warnings_of(data: Path, run_dir: Path, *overrides: str) -> list[str]:
    """Runs on the workers: what the start of a run warns of."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("nvlm_train")
    log.addHandler(handler)
    try:
        runs.run(data, run_dir, *overrides, stop_after=1)
    finally:
        log.removeHandler(handler)
    return found


@pytest.mark.slow
def test_few_packs_for_a_deep_pipeline_are_warned_of(
    workers: WorkerPool, data: Path, tmp_path: Path
) -> None:
    world, parallel = layout("PP2")
    for size, is_warned in ((4, True), (24, False)):
        changes = ("stages.pretrain.pack_length=512", f"stages.pretrain.batch.size={size}")
        run_dir = tmp_path / str(size)
        said = workers.run(world, warnings_of, data, run_dir, *parallel, *changes)[0]
        few = [each for each in said if "which wait for each other; use shorter packs" in each]
        assert bool(few) == is_warned
        assert all(
            each.startswith("stages.pretrain.pack_length=512: step 0 has 1 ") for each in few
        )
