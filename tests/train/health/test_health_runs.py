"""Runs with NaN, loss spikes or a slow rank, on real gloo processes."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from nvlm_train.train.health.left_out import FILE_NAME, LeftOut
from nvlm_train.train.signals import EXIT_REQUEUE
from tests.train import runs
from tests.train.health import ills
from tests.train.layouts import NO_DROPOUT, layout
from tests.train.metric_names import documented, every_step, records, where_there_is_one
from tests.train.smoke import read_metrics
from tests.workers import WorkerPool

slow = pytest.mark.slow
SOME_FIELDS = where_there_is_one()
ONE_STAGE = ("schedule=[sft]", "stages.sft.steps=5", *NO_DROPOUT)


def without(run_dir: Path, first: int, last: int) -> None:
    """Makes a run directory whose run goes without some steps from the start."""
    run_dir.mkdir(parents=True)
    (run_dir / FILE_NAME).write_text(json.dumps([asdict(LeftOut("sft", first, last, "test"))]))


def assert_same_state(
    workers: WorkerPool, data: Path, world: int, one: Path, other: Path, *overrides: str
) -> None:
    """Checks bit for bit weights, fp32 copies, moments and step counts, on every rank."""
    states = [
        workers.run(world, ills.optimizer_state, data, run, *overrides) for run in (one, other)
    ]
    for mine, others in zip(*states, strict=True):
        assert len(mine) > 10
        assert all(torch.equal(a, b) for a, b in zip(mine, others, strict=True))


@pytest.mark.parametrize(
    ("name", "rank", "more"),
    [
        ("single", 0, ()),
        pytest.param("TP2 PP2", 2, (), marks=slow),
        pytest.param("DP2", 1, (), marks=slow),
        pytest.param("DP2", 1, ("stages.sft.parallel.distributed_optimizer=false",), marks=slow),
        pytest.param("PP2 DP2", 3, (), marks=slow),
    ],
)
def test_step_with_a_nan_equals_one_that_never_was(
    workers: WorkerPool, data: Path, tmp_path: Path, name: str, rank: int, more: tuple[str, ...]
) -> None:
    world, parallel = layout(name)
    overrides = [*ONE_STAGE, *parallel, *more]
    codes = workers.run(world, ills.not_a_number, data, tmp_path / "ill", rank, (3,), *overrides)
    assert codes == [0] * world
    without(tmp_path / "clean", 3, 3)
    assert workers.run(world, runs.run, data, tmp_path / "clean", *overrides) == [0] * world
    assert_same_state(workers, data, world, tmp_path / "ill", tmp_path / "clean", *overrides)
    ill, clean = (read_metrics(tmp_path / run) for run in ("ill", "clean"))
    assert [each["step"] for each in clean] == [1, 2, 4, 5]
    assert [each for each in ill if "not_finite" not in each] == clean
    assert [each["step"] for each in ill if each.get("not_finite")] == [3]


def test_samples_of_all_replicas_are_written(
    workers: WorkerPool, data: Path, tmp_path: Path
) -> None:
    """The run stops on all ranks when no step may be left out."""
    strict = (*ONE_STAGE, "health.max_non_finite_steps=0")
    messages = workers.run(2, ills.not_a_number, data, tmp_path / "run", 1, (2,), *strict)
    assert len(set(messages)) == 1
    assert "stage=sft step=2" in messages[0] and "grad_norm=nan" in messages[0]
    assert "health.max_non_finite_steps=0 allows 0" in messages[0]
    dump = json.loads((tmp_path / "run" / "health" / "not-finite-sft-00000002.json").read_text())
    assert {each["replica"] for each in dump["samples"]} == {0, 1}
    assert len(dump["samples"]) == 4
    keys = {(each["source"], each["shard"], each["key"]) for each in dump["samples"]}
    assert all(Path(shard).exists() and key for _, shard, key in keys)
    last = records(tmp_path / "run")[-1]
    assert last["not_finite"] == 1
    assert every_step() | documented("NotFiniteStep") <= last.keys()
    assert last.keys() <= every_step() | documented("NotFiniteStep") | SOME_FIELDS


@slow
def test_allowance_is_for_steps_in_a_row(workers: WorkerPool, data: Path, tmp_path: Path) -> None:
    allowed = (*ONE_STAGE, "stages.sft.steps=7", "health.max_non_finite_steps=1")
    codes = workers.run(1, ills.not_a_number, data, tmp_path / "single", 0, (2, 4), *allowed)
    assert codes == [0]
    message = workers.run(1, ills.not_a_number, data, tmp_path / "row", 0, (2, 3), *allowed)[0]
    assert "step=3" in message and "2 step(s) in a row" in message


SPIKY = (
    *ONE_STAGE, "stages.sft.steps=12", "checkpoint.interval_steps=4", "health.spike_window=8",
    "health.spike_threshold=5", "health.spike_skip_steps=1"
)  # fmt: skip


@slow
@pytest.mark.parametrize("name", ["single", "TP2 PP2"])
def test_rollback_equals_a_run_without_those_steps(
    workers: WorkerPool, data: Path, tmp_path: Path, name: str
) -> None:
    """The spike is at step 7, the newest checkpoint at 4. The run is stopped once after the rollback."""
    world, parallel = layout(name)
    overrides = [*SPIKY, *parallel, "health.spike=rollback"]
    ill = (data, tmp_path / "ill")
    codes = workers.run(world, ills.broken_weights, *ill, 7, 1, 9, *overrides)
    assert codes == [EXIT_REQUEUE] * world
    entries = json.loads((tmp_path / "ill" / FILE_NAME).read_text())
    assert [(each["first"], each["last"]) for each in entries] == [(6, 8)]
    assert workers.run(world, runs.run, *ill, *overrides) == [0] * world
    without(tmp_path / "clean", 6, 8)
    assert workers.run(world, runs.run, data, tmp_path / "clean", *overrides) == [0] * world
    assert read_metrics(tmp_path / "ill") == read_metrics(tmp_path / "clean")
    assert [each["step"] for each in read_metrics(tmp_path / "ill")] == [
        1,
        2,
        3,
        4,
        5,
        *range(9, 13),
    ]
    assert_same_state(workers, data, world, tmp_path / "ill", tmp_path / "clean", *overrides)


@slow
def test_rollbacks_end(workers: WorkerPool, data: Path, tmp_path: Path) -> None:
    """Weights break again after each rollback, so the run ends after the recipe's number of rollbacks."""
    overrides = [*SPIKY, "health.spike=rollback", "health.max_rollbacks=1"]
    message = workers.run(1, ills.broken_weights, data, tmp_path / "run", 7, 2, None, *overrides)[0]
    assert "loss spike" in message and "health.max_rollbacks=1" in message


@slow
def test_warning_goes_on(workers: WorkerPool, data: Path, tmp_path: Path) -> None:
    codes = workers.run(1, ills.broken_weights, data, tmp_path / "run", 7, 1, None, *SPIKY)
    assert codes == [0]
    assert len(read_metrics(tmp_path / "run")) == 12
    assert (tmp_path / "run" / "health" / "spike-sft-00000007.json").exists()
    assert not (tmp_path / "run" / FILE_NAME).exists()


@pytest.mark.parametrize(
    ("name", "rank", "part"),
    [
        pytest.param("DP2", 1, "data", marks=slow),
        pytest.param("TP2 PP2", 2, "compute", marks=slow),
        pytest.param("TP2 PP2", 1, "data", marks=slow),
    ],
)
def test_slow_rank_is_named(
    workers: WorkerPool, data: Path, tmp_path: Path, name: str, rank: int, part: str
) -> None:
    """It sleeps for a second in each step. The others' waiting for it is not counted as their own time."""
    world, parallel = layout(name)
    often = ("health.straggler_interval_steps=2", "loader.workers=0")
    run_dir = tmp_path / "run"
    overrides = [*ONE_STAGE, *parallel, *often]
    assert workers.run(world, ills.slow_rank, data, run_dir, rank, part, *overrides) == [0] * world
    reports = [each for each in records(run_dir) if "slowest_rank" in each]
    assert [each["step"] for each in reports] == [2, 4]
    for each in reports:
        assert every_step() | documented("SlowestRank") <= each.keys()
        assert each.keys() <= every_step() | documented("SlowestRank") | SOME_FIELDS
    last = reports[-1]
    assert last["slowest_rank"] == rank
    assert last[f"slowest_rank_{part}_seconds"] > 1.0
    assert last["slowest_rank_ratio"] > 1.2
