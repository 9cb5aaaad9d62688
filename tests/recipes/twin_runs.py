"""Runs on the workers: a twin, both stages."""

from __future__ import annotations

import os
from unittest import mock

import torch.distributed as dist

from nvlm_train.config.schema import Recipe
from nvlm_train.train.loop import train


def run(recipe: Recipe) -> int:
    """Trains the schedule."""
    with mock.patch.dict(os.environ, {"RANK": str(dist.get_rank())}):
        return train(recipe)
