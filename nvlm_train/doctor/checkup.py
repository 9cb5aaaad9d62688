"""Runs the checks in order: quick ones that need no torch come first."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from nvlm_train.config.paths import batch_script
from nvlm_train.config.rules import check
from nvlm_train.config.schema import Recipe
from nvlm_train.convert.vision import kind_of
from nvlm_train.doctor import material, services, storage, weights
from nvlm_train.doctor.finding import Findings, error, ok
from nvlm_train.doctor.machine import check_machine
from nvlm_train.doctor.ranks import check_ranks
from nvlm_train.doctor.rendezvous import World, check_port
from nvlm_train.doctor.report import Report
from nvlm_train.errors import ConfigError
from nvlm_train.recipe.load import load_recipe


@dataclass(frozen=True)
class Request:
    """Holds what the command line asks for."""

    overrides: Sequence[str]
    recipes: str | None
    shards_read: int | None
    """Shards of each source whose labels are counted; None for all."""
    script: str | None
    sbatch: str
    seconds: float
    """How long to wait for a silent rank."""
    json: str | None


def examine(request: Request) -> int:
    """Runs every check, and prints the findings on rank 0. Returns 1 when there was an error, else 0."""
    world = World.here()
    if world.rank:
        return _other_rank(world, request.seconds)
    report = Report()
    recipe = _recipe(request, world.size, report)
    if recipe is not None:
        report.take(storage.check_run_dir(recipe))
        report.take(storage.check_disk(recipe))
        report.take(material.check_tokenizer(recipe))
        report.take(weights.check_weights(recipe))
        report.take(services.check_wandb(recipe))
    if "SLURM_JOB_ID" not in os.environ:
        report.take(services.check_slurm(request.script or str(batch_script()), request.sbatch))
    # The other ranks wait for this one, so they are checked before shards are read.
    report.take(check_port(world))
    if world.size > 1:
        report.take(check_ranks(world, request.seconds))
    if recipe is not None:
        report.take(material.check_shards(recipe))
        report.take(material.check_labels(recipe, request.shards_read))
    report.take(check_machine(recipe))
    report.end()
    if request.json:
        report.write(request.json)
    return int(report.num_errors > 0)


def _recipe(request: Request, world_size: int, report: Report) -> Recipe | None:
    """Loads the recipe. Returns None when it has problems, which are then in the report."""
    try:
        recipe = load_recipe(request.overrides, request.recipes)
        check(recipe, world_size if world_size > 1 else None)
        kind_of(recipe.model.vision)
    except ConfigError as problems:
        report.take(_problems(problems))
        return None
    report.take(iter([ok("recipe", f"{recipe.name}: stages {', '.join(recipe.schedule)}")]))
    return recipe


def _problems(problems: ConfigError) -> Findings:
    for problem in problems.problems:
        yield error("recipe", problem, "correct the recipe")


def _other_rank(world: World, seconds: float) -> int:
    """Takes part in the checks of all ranks, and prints only what rank 0 cannot know."""
    report = Report()
    report.take(check_ranks(world, seconds))
    return int(report.num_errors > 0)
