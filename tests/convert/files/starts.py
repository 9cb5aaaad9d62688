"""Runs on the workers: the start of a run that must be refused on every rank before a model is built."""

from __future__ import annotations

import os
from collections.abc import Sequence
from unittest import mock

import torch.distributed as dist

from nvlm_train.errors import NvlmError
from nvlm_train.recipe.load import load_recipe
from nvlm_train.train import start
from nvlm_train.train.loop import train


def refusals(*recipes: Sequence[str]) -> list[str]:
    """Starts one run after the other, each of the overrides of a recipe.

    Returns:
        The messages with which they end on this rank. `{rank}` in overrides is the rank.
    """
    return [_refusal(overrides) for overrides in recipes]


def _refusal(overrides: Sequence[str]) -> str:
    rank = dist.get_rank()
    recipe = load_recipe([each.replace("{rank}", str(rank)) for each in overrides])
    built = AssertionError("a model was built before the weights were refused")
    with (
        mock.patch.dict(os.environ, {"RANK": str(rank)}),
        mock.patch.object(start, "build_topology", side_effect=built),
    ):
        try:
            train(recipe)
        except NvlmError as problem:
            return f"{type(problem).__name__}: {problem}"
    return "not refused"


def untrained(overrides: Sequence[str]) -> str:
    """The message with which a model for generation is refused on this rank."""
    recipe = load_recipe(list(overrides))
    try:
        start.untrained_replica(recipe, recipe.schedule[-1])
    except NvlmError as problem:
        return f"{type(problem).__name__}: {problem}"
    return "not refused"
