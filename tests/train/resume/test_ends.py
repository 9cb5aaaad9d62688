"""Data, stages and runs are trained to their last step, and their end is logged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nvlm_train.train.signals import EXIT_REQUEUE
from tests.doctor.test_ranks import free_port
from tests.train import runs
from tests.train.health import ills
from tests.train.layouts import layout
from tests.train.resume import ends
from tests.train.smoke import overrides, read_metrics
from tests.workers import WorkerPool

POSSIBLE = {"samples": 6, "packs": 4}
"""Steps of four samples, or of four packs, that 24 samples give."""


def limited(data: Path, directory: Path, unit: str) -> list[str]:
    """Returns overrides of a pretraining whose only source is drawn from once."""
    blend = directory / "once.yaml"
    shards = str(data / "captions-{000000..000001}.tar")
    blend.write_text(json.dumps({"sources": [{"name": "a", "shards": shards, "epochs": 1}]}))
    return [
        "schedule=[pretrain]",
        f"stages.pretrain.blend={blend}",
        f"stages.pretrain.batch.unit={unit}",
        "stages.pretrain.sequence_length=128",
        "checkpoint.interval_steps=1",
    ]


@pytest.mark.parametrize(
    ("unit", "name"),
    [
        pytest.param("samples", "single", marks=pytest.mark.slow),
        pytest.param("packs", "DP2", marks=pytest.mark.slow),
    ],
)
def test_limited_data_is_trained_to_its_end(
    workers: WorkerPool, data: Path, tmp_path: Path, unit: str, name: str
) -> None:
    """This holds too when the run is started again shortly before. One step more is refused at the start."""
    world, parallel = layout(name)
    settings = [*parallel, *limited(data, tmp_path, unit)]
    run_dir, steps = tmp_path / "run", POSSIBLE[unit]
    last = (*settings, f"stages.pretrain.steps={steps}")
    codes = workers.run(world, stop_late, data, run_dir, steps - 1, last)
    assert codes == [EXIT_REQUEUE] * world
    assert workers.run(world, runs.run, data, run_dir, *last) == [0] * world
    assert [each["step"] for each in read_metrics(run_dir)] == list(range(1, steps + 1))
    over = (*settings, f"stages.pretrain.steps={steps + 1}")
    messages = workers.run(world, ills.attempt, data, tmp_path / "over", *over)
    assert f"steps={steps + 1} is more than the blend gives" in messages[0]
    assert read_metrics(tmp_path / "over") == []


def stop_late(data: Path, run_dir: Path, stop_after: int, overrides: tuple[str, ...]) -> int:
    """Runs on the workers."""
    return runs.run(data, run_dir, *overrides, stop_after=stop_after)


def test_a_finished_run_says_so_and_how_to_go_on(
    workers: WorkerPool, data: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    assert workers.run(1, runs.run, data, run_dir) == [0]
    code, heard = workers.run(1, ends.run_and_hear, data, run_dir)[0]
    assert code == 0
    assert f"run_dir={run_dir} is finished (steps: pretrain 4, sft 4; newest" in heard
    assert "sft-00000004" in heard and "raise stages.sft.steps to train longer" in heard
    # The stage before is over, and no step of it can be added behind the next one's.
    code, _ = workers.run(1, ends.run_and_hear, data, run_dir, "stages.pretrain.steps=8")[0]
    assert "stages.pretrain.steps=8, and stage pretrain ended after 4" in str(code)
    code, _ = workers.run(1, ends.run_and_hear, data, run_dir, "stages.sft.steps=3")[0]
    assert "stages.sft.steps=3, and 4 are done; 4 ends the stage here" in str(code)
    assert len(read_metrics(run_dir)) == 8
    code, heard = workers.run(1, ends.run_and_hear, data, run_dir, "stages.sft.steps=6")[0]
    assert code == 0 and "is finished" not in heard
    steps = [(each["stage"], each["step"], each["global_step"]) for each in read_metrics(run_dir)]
    assert steps[7:] == [("sft", 4, 8), ("sft", 5, 9), ("sft", 6, 10)]


LEAVE = """
import sys
import torch.distributed as dist
from nvlm_train.cli import main
assert main(["train", *sys.argv[1:]]) == 0
assert not dist.is_initialized()
"""


@pytest.mark.slow
def test_a_run_leaves_its_world(data: Path, tmp_path: Path) -> None:
    """It runs in a process of its own, as a user starts it."""
    command = [sys.executable, "-c", LEAVE, *overrides(data, tmp_path / "run")]
    environment = {**os.environ, "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
