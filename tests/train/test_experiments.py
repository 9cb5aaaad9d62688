"""Every experiment that the package brings trains, in its own layout, for a few steps."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from nvlm_train.config.paths import recipes_dir
from nvlm_train.demo.smollm2 import prepare_language_model
from nvlm_train.model.global_weights import part_of
from tests.train import experiments
from tests.train.smoke import read_metrics
from tests.workers import WorkerPool

EXPERIMENTS = sorted(path.stem for path in (recipes_dir() / "experiment").glob("demo*.yaml"))
STEPS = 4


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment_trains(
    workers: WorkerPool, data: Path, tmp_path: Path, experiment: str
) -> None:
    """A stage changes every parameter that it trains and no bit of the others. The loss falls."""
    if experiment == "demo_smollm2":
        prepare_language_model(tmp_path / "run" / "language_model")
    place = (experiment, data, tmp_path / "run", STEPS)
    recipe = experiments.shortened(*place)
    parallel = recipe.stages["sft"].parallel
    world = parallel.tensor * parallel.pipeline
    assert workers.run(world, experiments.run, *place) == [0] * world
    losses = [record["loss"] for record in read_metrics(tmp_path / "run")]
    assert len(losses) == 2 * STEPS and all(math.isfinite(loss) for loss in losses)
    assert min(losses[STEPS:]) < losses[0]
    before, *after = workers.run(1, experiments.weights, *place)[0]
    for name, weights in zip(recipe.schedule, after, strict=True):
        trained = set(recipe.stages[name].trainable)
        changed = {key for key in before if not torch.equal(before[key], weights[key])}
        assert changed == {key for key in before if part_of(key) in trained}, name
        before = weights
