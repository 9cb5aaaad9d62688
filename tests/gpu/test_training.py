"""Whole runs on a GPU: a CPU's losses, through the hand-over; the same losses after a stop or a kill."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nvlm_train.train.checkpoint.directory import complete_checkpoints
from nvlm_train.train.signals import EXIT_REQUEUE
from tests.gpu import training_runs
from tests.gpu.paths import FAST
from tests.train.checkpoint import saves
from tests.train.layouts import NO_DROPOUT
from tests.train.smoke import make_smoke_data, read_metrics
from tests.workers import WorkerPool

STEPS = 8
"""Four of each stage."""
KILLED_AFTER = 3
"""Steps of the first stage, whose dropout is on."""
CONTINUES = {"fp32": (1e-5, 1e-3), "bf16": (2e-3, 5e-2)}
"""Relative differences of losses and of gradient norms between two runs of one kind. A GPU adds in no fixed
order: in fp32 that leaves 1e-7 a step, in bf16 now and then another rounding (2e-3). The small model's loss
hardly depends on dropout, its gradient does."""
AS_ON_A_CPU = (1e-4, 1e-3)
"""As between layouts."""
H_SMOKE = ["model=nvlm_h_smoke", *NO_DROPOUT]


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("smoke")
    make_smoke_data(root)
    return root


def check(found: Path, expected: Path, tolerances: tuple[float, float]) -> None:
    """Compares losses and gradient norms of the same samples, step by step."""
    ours, theirs = read_metrics(found), read_metrics(expected)
    for key in ("global_step", "stage", "samples_hash", "trained_tokens"):
        assert [each[key] for each in ours] == [each[key] for each in theirs]
    assert len(ours) == STEPS
    for key, tolerance in zip(("loss", "grad_norm"), tolerances, strict=True):
        values = [[each[key] for each in records] for records in (ours, theirs)]
        assert values[0] == pytest.approx(values[1], rel=tolerance), key


@pytest.mark.gpu
def test_a_run_on_a_gpu_is_that_of_a_cpu(
    gpu: WorkerPool, workers: WorkerPool, shards: Path, tmp_path: Path
) -> None:
    """Both stages of H in fp32: what the second one starts from is what the first one ended with."""
    for pool, path in ((gpu, "torch fp32"), (workers, "CPU")):
        assert pool.run(1, training_runs.run, shards, tmp_path / path, path, H_SMOKE) == [0]
    check(tmp_path / "torch fp32", tmp_path / "CPU", AS_ON_A_CPU)


@pytest.mark.gpu
def test_a_killed_run_goes_on_on_a_gpu(gpu: WorkerPool, shards: Path, tmp_path: Path) -> None:
    check_killed(gpu, shards, tmp_path, "torch fp32")


@pytest.mark.gpu
@pytest.mark.parametrize("path", FAST)
def test_a_stopped_run_goes_on_on_a_gpu(
    gpu: WorkerPool, shards: Path, tmp_path: Path, path: str
) -> None:
    arguments = (shards, tmp_path / "stopped", path, [])
    assert gpu.run(1, training_runs.run, *arguments, KILLED_AFTER) == [EXIT_REQUEUE]
    assert gpu.run(1, training_runs.run, *arguments) == [0]
    assert gpu.run(1, training_runs.run, shards, tmp_path / "whole", path, []) == [0]
    check(tmp_path / "stopped", tmp_path / "whole", CONTINUES["bf16"])


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_save_does_not_see_what_comes_after_it(
    gpu: WorkerPool, shards: Path, tmp_path: Path, precision: str
) -> None:
    """The copies are still on their way when the call returns."""
    run = (shards, tmp_path / "run", f"precision={precision}")
    assert [same for _, same in gpu.run(1, saves.save_while_training_goes_on, *run)] == [True]


def check_killed(pool: WorkerPool, shards: Path, directory: Path, path: str) -> None:
    """Kills a run, keeps a copy of what it left as `left`, and lets it go on."""
    whole, killed = directory / "whole", directory / "killed"
    training_runs.kill(shards, killed, path, KILLED_AFTER, [])
    assert len(read_metrics(killed)) == KILLED_AFTER
    assert complete_checkpoints(killed)
    shutil.copytree(killed, directory / "left")
    assert pool.run(1, training_runs.run, shards, killed, path, []) == [0]
    assert pool.run(1, training_runs.run, shards, whole, path, []) == [0]
    check(killed, whole, CONTINUES["fp32"])


@pytest.mark.slow
def test_a_killed_run_goes_on(workers: WorkerPool, shards: Path, tmp_path: Path) -> None:
    """What a GPU is asked, on a CPU; and without the generators' states it is seen."""
    check_killed(workers, shards, tmp_path, "CPU")
    broken = training_runs.run_without_generators
    assert workers.run(1, broken, shards, tmp_path / "left", "CPU", []) == [0]
    with pytest.raises(AssertionError):
        check(
            tmp_path / "left",
            tmp_path / "whole",
            (10 * CONTINUES["fp32"][0], 10 * CONTINUES["fp32"][1]),
        )
