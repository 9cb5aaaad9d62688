"""Runs on the workers: real training runs, stopped by real signals, and what they leave behind."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from nvlm_train.parallel import kernels
from nvlm_train.parallel.topology import build_topology
from nvlm_train.train.checkpoint import directory, sharded_state
from nvlm_train.train.engine import Engine, build_engine
from nvlm_train.train.loop import train
from nvlm_train.train.tracking.tracker import Tracker
from tests.parity.gradients import gather
from tests.train.smoke import smoke_recipe


def run(root: Path, run_dir: Path, *overrides: str, stop_after: int | None = None) -> int:
    """Trains the smoke recipe; the last rank gets SIGTERM after `stop_after` steps of the run."""
    recipe = smoke_recipe(root, run_dir, *overrides)
    original = Tracker.log

    def log(self: Tracker, record: dict) -> None:
        original(self, record)
        if record["global_step"] == stop_after and dist.get_rank() == dist.get_world_size() - 1:
            # To this thread, so that it has come before the next line; any other may sleep for long.
            signal.raise_signal(signal.SIGTERM)

    rank = {"RANK": str(dist.get_rank())}
    with mock.patch.object(Tracker, "log", log), mock.patch.dict(os.environ, rank):
        return train(recipe)


def open_checkpoint(root: Path, run_dir: Path, *overrides: str) -> Engine:
    """Opens the newest checkpoint of a run in the layout that the overrides describe."""
    recipe = smoke_recipe(root, run_dir, *overrides)
    newest = directory.complete_checkpoints(run_dir)[-1]
    stage = recipe.stages[newest.name.split("-")[0]]
    topology = build_topology(stage.parallel, recipe.seed)
    engine = build_engine(recipe, stage, topology, kernels.detect())
    sharded_state.load(engine, newest, same_layout=False)
    return engine


def final_weights(root: Path, run_dir: Path, *overrides: str) -> dict[str, torch.Tensor]:
    """Returns the canonical weights of the newest checkpoint."""
    return gather(open_checkpoint(root, run_dir, *overrides), lambda parameter: parameter.data)
