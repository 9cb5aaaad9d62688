"""Runs on the workers: a twin, both stages."""

from __future__ import annotations

import os
from unittest import mock

import torch.distributed as dist
from torch import Tensor

from nvlm_train.config.schema import Recipe
from nvlm_train.train import start
from nvlm_train.train.loop import train


def run(recipe: Recipe) -> int:
    """Trains the schedule."""
    with mock.patch.dict(os.environ, {"RANK": str(dist.get_rank())}):
        return train(recipe)


def run_and_show_tables(recipe: Recipe) -> list[Tensor]:
    """Trains the schedule. Returns this rank's copies of the word table at the end of each stage.

    Returns:
        By stage, its slice [V / TP, H] in the training dtype; none on ranks in the middle of a pipeline.
    """
    works = []
    start_stage = start.start_stage

    def remembered(*args: object) -> object:
        works.append(start_stage(*args))  # type: ignore[arg-type]
        return works[-1]

    with mock.patch.object(start, "start_stage", remembered):
        assert run(recipe) == 0
    models = [work.engine.model.module.language_model for work in works]
    ends = works[0].engine.topology
    if not (ends.is_first_pp_stage or ends.is_last_pp_stage):
        return []
    return [model.table().detach().clone() for model in models]
