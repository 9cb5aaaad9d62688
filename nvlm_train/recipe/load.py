"""Loads a recipe: composed, completed from the weights that it names, checked. What every command calls."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from nvlm_train.config.load import FROM, compose_recipe
from nvlm_train.config.paths import resolve_path
from nvlm_train.config.schema import Recipe
from nvlm_train.errors import ConfigError
from nvlm_train.recipe.sizes import SIZES, described

TOKENIZER = "model.tokenizer.path"


def load_recipe(overrides: Sequence[str], recipes_dir: str | Path | None = None) -> Recipe:
    """Composes a recipe, completes it and checks it.

    `model.language.from: DIRECTORY` and `model.vision.from: DIRECTORY` set every size from config.json there,
    and name the same directory as `weights`; for the language model also as the tokenizer's, if it has one.
    What is stated beside `from`, in the same file or later, stays.

    Args:
        overrides: Hydra's grammar: `experiment=smoke`, `stages.sft.steps=10`.
        recipes_dir: the user's own recipes, looked up after the package's.

    Raises:
        ConfigError: everything that is wrong with the recipe, not only the first problem.
    """
    return compose_recipe(overrides, recipes_dir, complete)


def complete(group: str, stated: Mapping[str, Any], run_dir: str) -> Mapping[str, Any]:
    """Finds what a group leaves to its weights.

    Args:
        group: `model.vision` or `model.language`.
        stated: its keys that stay, `from` among them.
        run_dir: has the sizes of a run that was begun, when the directory has gone.

    Returns:
        Values by dotted key.

    Raises:
        ConfigError: there is no such directory, or nothing in it that can be read.
    """
    if stated.get(FROM) is None:
        return _padding(group, stated, run_dir)
    directory = Path(resolve_path(str(stated[FROM])))
    kept = None if (directory / "config.json").is_file() else _sizes_of_run(group, run_dir)
    sizes = kept or described(group, directory, f"{group}.{FROM}={directory}")
    if "vocab_size" in sizes:
        sizes = _padded(sizes, stated)
    found = {f"{group}.{name}": value for name, value in sizes.items()}
    found[f"{group}.weights"] = str(stated[FROM])
    if group == "model.language" and (directory / "tokenizer.json").is_file():
        found[TOKENIZER] = str(stated[FROM])
    return found


def _padded(sizes: Mapping[str, Any], stated: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe may state a larger `vocab_size`: the rows beyond those of the weights are padding."""
    rows, asked = sizes["vocab_size"], stated.get("vocab_size")
    is_padded = type(asked) is int and type(rows) is int and asked > rows
    return {"num_tokens": rows if is_padded else None, **sizes}


def _padding(group: str, stated: Mapping[str, Any], run_dir: str) -> Mapping[str, Any]:
    """The same for a recipe that states its sizes and `weights`.

    A run that was begun before there was `num_tokens` goes on as it began.
    """
    directory, asked = stated.get("weights"), stated.get("vocab_size")
    if group != "model.language" or directory is None or type(asked) is not int:
        return {}
    known = _group_of_run(group, run_dir)
    if known is not None:
        return {f"{group}.num_tokens": known.get("num_tokens")}
    try:
        rows = described(group, Path(resolve_path(str(directory))), "")["vocab_size"]
    except ConfigError:
        # Whether weights fit is judged later, and by more than this.
        return {}
    return {f"{group}.num_tokens": rows} if type(rows) is int and asked > rows else {}


def _sizes_of_run(group: str, run_dir: str) -> dict[str, Any] | None:
    known = _group_of_run(group, run_dir)
    return {name: known[name] for name in SIZES[group] if name in known} if known else None


def _group_of_run(group: str, run_dir: str) -> dict[str, Any] | None:
    """The group as the run's newest complete checkpoint has it; None without one."""
    complete = Path(run_dir).glob("checkpoints/*/manifest.json")
    newest = max(complete, key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        return None
    try:
        model = json.loads((newest.parent / "state.json").read_text(encoding="utf-8"))["recipe"][
            "model"
        ]
        known: dict[str, Any] = model[group.removeprefix("model.")]
    except (OSError, ValueError, KeyError, TypeError):
        # Damage is for the reader of checkpoints to judge: it has an older one, or says so.
        return None
    return known


def as_yaml(recipe: Recipe) -> str:
    """The whole recipe with its defaults, as YAML that can be composed again."""
    plain = json.loads(json.dumps(asdict(recipe), default=dict))
    return yaml.safe_dump(plain, sort_keys=False, width=120)
