"""Loads a recipe: composed, completed from the weights that it names, checked. What every command calls."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from nvlm_train.config.layouts import padded_rows
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
    A table that the tensor parallelism of a scheduled stage does not divide is padded.
    What is stated beside `from`, in the same file or later, stays.

    Args:
        overrides: Hydra's grammar: `experiment=smoke`, `stages.sft.steps=10`.
        recipes_dir: the user's own recipes, looked up after the package's.

    Raises:
        ConfigError: everything that is wrong with the recipe, not only the first problem.
    """
    return compose_recipe(overrides, recipes_dir, complete)


def complete(group: str, stated: Mapping[str, Any], recipe: Mapping[str, Any]) -> Mapping[str, Any]:
    """Finds what a group leaves to its weights.

    Args:
        group: `model.vision` or `model.language`.
        stated: its keys that stay, `from` among them.
        recipe: as composed. Its `run_dir` has the sizes of a run that was begun, its stages have the
            layouts that a table is padded for.

    Returns:
        Values by dotted key.

    Raises:
        ConfigError: there is no such directory, or nothing in it that can be read.
    """
    run_dir = str(recipe.get("run_dir"))
    if stated.get(FROM) is None:
        return _padding(group, stated, run_dir)
    directory = Path(resolve_path(str(stated[FROM])))
    kept = None if (directory / "config.json").is_file() else _sizes_of_run(group, run_dir)
    sizes = kept or described(group, directory, f"{group}.{FROM}={directory}")
    if kept is None and "vocab_size" in sizes:
        asked = stated.get("vocab_size") or _rows(sizes["vocab_size"], group, recipe)
        sizes = _padded(sizes, asked)
    found = {f"{group}.{name}": value for name, value in sizes.items()}
    found[f"{group}.weights"] = str(stated[FROM])
    if group == "model.language" and (directory / "tokenizer.json").is_file():
        found[TOKENIZER] = str(stated[FROM])
    return found


def _padded(sizes: Mapping[str, Any], asked: Any) -> dict[str, Any]:
    """A larger table than that of the weights: the rows beyond theirs are padding."""
    rows = sizes["vocab_size"]
    if type(asked) is not int or type(rows) is not int or asked <= rows:
        return {"num_tokens": None, **sizes}
    return {**sizes, "vocab_size": asked, "num_tokens": rows}


def _rows(rows: Any, group: str, recipe: Mapping[str, Any]) -> Any:
    """How large a table is made of the weights' one, so that the layouts of all scheduled stages cut it.

    A run that was begun keeps its table: other layouts may continue it.
    """
    if type(rows) is not int:
        return rows
    begun = _group_of_run(group, str(recipe.get("run_dir")))
    if begun is not None:
        return begun.get("vocab_size", rows)
    sizes = [size for size in _tensor_sizes(recipe) if type(size) is int and size > 0]
    return rows if all(rows % size == 0 for size in sizes) else padded_rows(rows, sizes)


def _tensor_sizes(recipe: Mapping[str, Any]) -> Iterator[Any]:
    """Yields those of the scheduled stages, as stated; what is no group or no list is refused later."""
    names = recipe.get("schedule")
    for name in names if isinstance(names, Sequence) else ():
        group: Any = recipe
        for key in ("stages", name, "parallel"):
            group = group.get(key) if isinstance(group, Mapping) else None
        if isinstance(group, Mapping):
            yield group.get("tensor")


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
    """The whole recipe with its defaults, as YAML that can be composed again: an experiment's file."""
    plain = json.loads(json.dumps(asdict(recipe), default=dict))
    return _HEADER + yaml.safe_dump(plain, sort_keys=False, width=120)


_HEADER = """\
# @package _global_
# The same recipe again, with this as DIRECTORY/experiment/NAME.yaml:
# nvlm train experiment=NAME model=nvlm_d --recipes DIRECTORY
"""
