"""Runs on the workers: a shipped experiment in a few steps on the smoke data."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch.distributed as dist
from torch import Tensor

from nvlm_train.config.schema import ParallelConfig, Recipe
from nvlm_train.parallel import kernels
from nvlm_train.parallel.topology import build_topology
from nvlm_train.recipe.load import load_recipe
from nvlm_train.train.checkpoint import sharded_state
from nvlm_train.train.engine import build_engine
from nvlm_train.train.loop import train
from nvlm_train.train.start import initial_weights
from tests.parity.gradients import gather


def shortened(experiment: str, data: Path, run_dir: Path, steps: int) -> Recipe:
    """Returns the experiment as it is, except for the data and its length."""
    return load_recipe(
        [f"experiment={experiment}", f"run_dir={run_dir}"]
        + [
            f"stages.{stage}.{field}={value}"
            for stage in ("pretrain", "sft")
            for field, value in {
                "blend": data / "blend.yaml",
                "steps": steps,
                "batch.size": 12,
                "optimizer.warmup_steps": 1,
            }.items()
        ]
    )


def run(experiment: str, data: Path, run_dir: Path, steps: int) -> int:
    """Trains both stages."""
    with mock.patch.dict(os.environ, {"RANK": str(dist.get_rank())}):
        return train(shortened(experiment, data, run_dir, steps))


def weights(experiment: str, data: Path, run_dir: Path, steps: int) -> list[dict[str, Tensor]]:
    """Returns canonical weights before the first stage and after each."""
    recipe = shortened(experiment, data, run_dir, steps)
    found = []
    for name in (None, *recipe.schedule):
        stage = replace(recipe.stages[name or "pretrain"], parallel=ParallelConfig())
        topology = build_topology(stage.parallel, recipe.seed)
        engine = build_engine(recipe, stage, topology, kernels.detect())
        initial_weights(recipe, engine.model.module)
        if name is not None:
            path = run_dir / "checkpoints" / f"{name}-{steps:08d}"
            sharded_state.load_weights(engine.model.module, path)
        found.append(gather(engine, lambda parameter: parameter.data.clone()))
    return found
