"""Ends a run whose weights or tokenizer do not fit the recipe, by the checks of `nvlm doctor`."""

from __future__ import annotations

import logging

import torch.distributed as dist

from nvlm_train.config.schema import Recipe
from nvlm_train.convert import check
from nvlm_train.errors import ConfigError

logger = logging.getLogger(__name__)


def require_fitting(recipe: Recipe) -> None:
    """Checks weights and tokenizer on every rank, before any of them takes memory for a model.

    Called by all ranks together. Each rank may see other files, on its node's own disk; a problem on
    one rank ends all of them.

    Raises:
        ConfigError: on every rank; it names the problems of all ranks, each once.
    """
    problems = list(check.all_of(recipe))
    everyone: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, [str(each) for each in problems if each.level == "error"])
    errors = dict.fromkeys(text for texts in everyone for text in texts)
    if errors:
        raise ConfigError(tuple(errors))
    if dist.get_rank() == 0:
        for problem in problems:
            logger.warning("%s", problem)
