"""`nvlm dashboard`: makes a wandb workspace with the plots of a training run."""

from __future__ import annotations

import argparse
import sys


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command; its overrides are those of `nvlm train`."""
    command = commands.add_parser(
        "dashboard", help="make a wandb workspace with a run's plots and example tables (online)"
    )
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for nvlm train")
    command.add_argument("--recipes", metavar="DIR", help="your own recipes")
    command.set_defaults(run=dashboard)


def dashboard(options: argparse.Namespace) -> int:
    """Saves the workspace and prints its address.

    Raises:
        NvlmError: the recipe has no tracking.entity, or wandb-workspaces is not installed.
    """
    from nvlm_train.errors import ConfigError
    from nvlm_train.recipe.load import load_recipe
    from nvlm_train.train.tracking.dashboard import workspace

    recipe = load_recipe(options.overrides, options.recipes)
    if recipe.tracking.entity is None:
        raise ConfigError(
            ["tracking.entity=null: a workspace belongs to a user or team; name yours"]
        )
    made = workspace(recipe, recipe.tracking.entity)
    made.save()
    sys.stdout.write(f"{made.url}\n")
    return 0
