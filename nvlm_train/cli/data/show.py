"""`nvlm data show`: samples of a source, or a step, as the model sees them, in one HTML page."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from nvlm_train.errors import ConfigError

if TYPE_CHECKING:
    from nvlm_train.config.schema import Recipe
    from nvlm_train.data.viewing.page import PageContext


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command with its arguments."""
    command = commands.add_parser("show", help="an HTML page of what the model sees")
    command.add_argument(
        "what",
        nargs="*",
        metavar="[SOURCE] KEY=VALUE",
        help="a source of the blend; Hydra overrides",
    )
    command.add_argument("--step", type=int, metavar="N", help="the samples of this optimizer step")
    command.add_argument("--stage", help="default: the schedule's last")
    command.add_argument("--out", required=True, metavar="FILE.html")
    command.add_argument("--key", action="append", default=[], help="show these samples only")
    command.add_argument("--samples", type=int, default=12, help="how many to show in full")
    command.add_argument("--dp", type=int, default=1, metavar="N", help="data-parallel ranks")
    command.add_argument("--recipes", metavar="DIR", help="your own recipes")
    command.set_defaults(run=show)


def show(options: argparse.Namespace) -> int:
    """Writes the page.

    Raises:
        NvlmError: the recipe, its shards, or a source or key that does not exist.
    """
    from nvlm_train.recipe.load import load_recipe

    overrides = [each for each in options.what if "=" in each]
    names = [each for each in options.what if "=" not in each]
    _check(options, names)
    recipe = load_recipe(overrides, options.recipes)
    # Looking is allowed where training would stop.
    recipe = replace(recipe, loader=replace(recipe.loader, max_skipped_fraction=1.0))
    stage = options.stage or recipe.schedule[-1]
    if stage not in recipe.stages:
        raise ConfigError([f"stage={stage}: the recipe has {', '.join(recipe.stages)}"])
    page = (
        _source_page(options, recipe, stage, names[0])
        if names
        else _step_page(options, recipe, stage)
    )
    Path(options.out).write_text(page, encoding="utf-8")
    sys.stdout.write(f"{options.out}: {len(page) / 1e6:.1f} MB\n")
    return 0


def _check(options: argparse.Namespace, names: list[str]) -> None:
    problems = []
    if len(names) + (options.step is not None) != 1:
        problems.append(
            f"SOURCE={' '.join(names) or 'none'}, --step={options.step}: "
            "name one source of the blend, or a step"
        )
    if options.step is not None and options.step < 0:
        problems.append(f"--step={options.step}: steps count from 0")
    for name in ("dp", "samples"):
        if getattr(options, name) < 1:
            problems.append(f"--{name}={getattr(options, name)} must be at least 1")
    if problems:
        raise ConfigError(problems)


def _source_page(options: argparse.Namespace, recipe: Recipe, stage: str, name: str) -> str:
    from nvlm_train.config.paths import data_recipes_dir
    from nvlm_train.data.dataset import build_encoder
    from nvlm_train.data.plan.data_recipe import list_shards, read_blend
    from nvlm_train.data.plan.sources import open_sources
    from nvlm_train.data.shards.store import Store
    from nvlm_train.data.viewing.page import source_page
    from nvlm_train.data.viewing.samples import view_source

    blend = read_blend(recipe.stages[stage].blend, str(data_recipes_dir()))
    names = tuple(source.name for source in blend.sources)
    if name not in names:
        raise ConfigError([f"source={name}: blend={blend.name} has {', '.join(names)}"])
    encoder = build_encoder(recipe.stages[stage], recipe)
    only = replace(blend, sources=tuple(each for each in blend.sources if each.name == name))
    store = Store(recipe.loader.data_root)
    (source,) = open_sources(list_shards(only, store), store, encoder, recipe.loader.index_dir)
    views = view_source(source, options.key, options.samples, encoder)
    return source_page(_context(options, recipe, stage, names), name, views)


def _step_page(options: argparse.Namespace, recipe: Recipe, stage: str) -> str:
    from nvlm_train.config.paths import data_recipes_dir
    from nvlm_train.data.dataset import build_data
    from nvlm_train.data.viewing.page import step_page
    from nvlm_train.data.viewing.steps import view_step

    plan, encoder = build_data(recipe.stages[stage], recipe, str(data_recipes_dir()))
    step = view_step(plan, encoder, options.step, options.dp, options.key, options.samples)
    return step_page(_context(options, recipe, stage, plan.source_names), step)


def _context(
    options: argparse.Namespace, recipe: Recipe, stage: str, sources: tuple[str, ...]
) -> PageContext:
    from nvlm_train.data.viewing.page import PageContext
    from nvlm_train.geometry import pack_length

    step = [] if options.step is None else ["--step", str(options.step), "--dp", str(options.dp)]
    command = ["nvlm data show", *options.what, *step, "--stage", stage]
    settings = recipe.stages[stage]
    return PageContext(
        recipe=recipe.name,
        stage=stage,
        architecture=recipe.model.architecture,
        blend=Path(settings.blend).stem,
        sequence_length=settings.sequence_length,
        pack_length=pack_length(settings),
        sources=sources,
        command=" ".join(command),
    )
