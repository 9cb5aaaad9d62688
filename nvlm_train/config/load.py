"""Composes a recipe with Hydra. The only file that imports hydra; it makes no output directories."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from nvlm_train.config.build import MANDATORY, build
from nvlm_train.config.origin import Sources
from nvlm_train.config.paths import recipes_dir as shipped_recipes
from nvlm_train.config.paths import resolve_path
from nvlm_train.config.rules import check
from nvlm_train.config.schema import RECIPE_FORMAT, Recipe
from nvlm_train.errors import ConfigError

ROOT = "train"
"""The recipe that all others are composed into: recipes/train.yaml."""

_ADDITIVE = frozenset({"experiment"})
"""Groups that train.yaml does not choose: `experiment=demo` means `+experiment=demo`."""


Complete = Callable[[str, Mapping[str, Any], Mapping[str, Any]], Mapping[str, Any]]
"""(group, what is stated of it, the recipe) -> dotted keys and values from the files that it names."""

COMPLETED = ("model.vision", "model.language")
"""Groups that files may complete: their key `from` names a directory of weights."""
FROM = "from"


def compose_recipe(
    overrides: Sequence[str], recipes_dir: str | Path | None, complete: Complete
) -> Recipe:
    """Composes, builds and checks a recipe. Commands call `nvlm_train.recipe.load.load_recipe`.

    Args:
        overrides: Hydra's grammar: `experiment=smoke`, `stages.sft.steps=10`.
        recipes_dir: the user's own recipes, looked up after the package's.
        complete: finds in files what the recipe leaves to them.

    Raises:
        ConfigError: everything that is wrong with the recipe, not only the first problem.
    """
    directories = _directories(recipes_dir)
    composed, files = _compose([_normalise(each, directories) for each in overrides], directories)
    keys = [key for each in overrides for key in _keys(each)]
    sources = Sources.read(files, keys, directories)
    incomplete: dict[str, Sequence[str]] = {}
    try:
        sources = _completed(composed, sources, complete, incomplete)
        plain = OmegaConf.to_container(composed, resolve=True)
    except InterpolationKeyError as error:
        raise ConfigError(_problems(incomplete) or [_unresolved(error)]) from error
    except OmegaConfBaseException as error:
        raise ConfigError(_problems(incomplete) or [_first_line(error)]) from error
    _check_format(plain, sources)
    try:
        recipe = build(Recipe, _resolve_paths(plain), origin=sources.find)
    except ConfigError as error:
        own = tuple(f"{group}." for group in incomplete)
        others = [each for each in error.problems if not each.startswith(own)]
        raise ConfigError([*_problems(incomplete), *others]) from error
    if incomplete:
        raise ConfigError(_problems(incomplete))
    check(recipe)
    return recipe


def _problems(incomplete: Mapping[str, Sequence[str]]) -> list[str]:
    return [each for problems in incomplete.values() for each in problems]


def _keys(override: str) -> list[str]:
    """The dotted keys that an override states: those inside of a mapping, which Hydra merges."""
    parsed = OverridesParser.create().parse_override(override)
    value = None if parsed.is_delete() else parsed.value()
    return list(_leaves(str(parsed.key_or_group), value))


def _leaves(key: str, value: Any) -> Iterator[str]:
    if not isinstance(value, dict) or not value:
        yield key
        return
    for name, inside in value.items():
        yield from _leaves(f"{key}.{name}", inside)


def _completed(
    composed: DictConfig,
    sources: Sources,
    complete: Complete,
    incomplete: dict[str, Sequence[str]],
) -> Sources:
    """Adds what files say to a recipe, before its references are resolved.

    Why a group cannot be completed is added to `incomplete`.

    A key that is stated at least as late as `from` stays: the command line, or the same file. An earlier
    one gives way, as it does to every later value.
    """
    read: dict[str, str] = {}
    for group in COMPLETED:
        content = OmegaConf.select(composed, group)
        if not isinstance(content, DictConfig):
            continue
        directory = OmegaConf.select(content, FROM)
        is_missing = OmegaConf.is_missing(content, FROM)
        if is_missing or not (directory is None or isinstance(directory, str) and directory):
            shown = MANDATORY if is_missing else directory
            incomplete[group] = [f"{group}.{FROM}={shown} is no directory; give its path, or null"]
            continue
        since = sources.place(f"{group}.{FROM}") if directory is not None else -1

        def stays(dotted: str, since: int = since) -> bool:
            is_there = OmegaConf.select(composed, dotted, default=MANDATORY) != MANDATORY
            return is_there and sources.place(dotted) >= since

        stated = {key: content[key] for key in map(str, content) if stays(f"{group}.{key}")}
        try:
            found = complete(group, stated, composed)
        except ConfigError as error:
            incomplete[group] = error.problems
            continue
        with open_dict(composed):
            for dotted, value in found.items():
                if not stays(dotted):
                    OmegaConf.update(composed, dotted, value, merge=False, force_add=True)
                    read[dotted] = f"{directory or stated.get('weights')}/config.json"
            if FROM in content:
                del content[FROM]
    return replace(sources, completed=read)


def _check_format(plain: Any, sources: Sources) -> None:
    """Before anything else is judged: keys may have other names and meanings in another format."""
    stated = plain.get("format", RECIPE_FORMAT)
    if stated != RECIPE_FORMAT:
        raise ConfigError(
            [
                f"format={stated!r} (stated in {sources.find('format')}): this nvlm-train reads recipes of "
                f"format {RECIPE_FORMAT}; use the nvlm-train that they were written for, or rewrite them "
                "as CHANGELOG.md says and state that number"
            ]
        )


def _directories(own: str | Path | None) -> tuple[Path, ...]:
    shipped = shipped_recipes()
    if own is None:
        return (shipped,)
    directory = Path(own).resolve()
    if not directory.is_dir():
        raise ConfigError([f"recipes={own}: no such directory; give a directory of recipe groups"])
    return (shipped, directory)


def _compose(
    overrides: list[str], directories: tuple[Path, ...]
) -> tuple[DictConfig, list[tuple[str, str]]]:
    """The recipe, and its files with the places of their keys in the order in which they were merged."""
    shipped, *own = directories
    if own:
        overrides = [f"hydra.searchpath=[{','.join(f'file://{path}' for path in own)}]", *overrides]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(shipped), version_base="1.3"):
            composed = compose(ROOT, overrides)
            loader = GlobalHydra.instance().config_loader()
            merged = loader.compute_defaults_list(ROOT, overrides, RunMode.RUN).defaults
    except MissingConfigException as error:
        raise ConfigError([_missing_choice(error)]) from error
    except OverrideParseException as error:
        raise ConfigError([_not_an_override(error)]) from error
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError([_first_line(error)]) from error
    except ValueError as error:
        # Hydra's answer to a choice that is no name.
        raise ConfigError([_no_choice(error, overrides)]) from error

    return composed, [(str(file.config_path), file.package or "") for file in merged]


def _unresolved(error: InterpolationKeyError) -> str:
    """A file refers to a key that no file states: usually a group was not chosen."""
    missing = re.search(r"'([\w.]+)' not found", str(error))
    key = missing.group(1) if missing else str(error)
    part = re.match(r"model\.(vision|language)\b", key)
    remedy = f"choose {part.group(1)}=NAME (recipes/{part.group(1)}/)" if part else "state it"
    return f"{error.full_key} refers to {key}, which nothing states; {remedy}"


def _not_an_override(error: OverrideParseException) -> str:
    reason = error.message.splitlines()[0]
    shown = str(error.override).lstrip("+")
    if "=~" in shown:
        return f"{shown}: not an override, because ~ is not replaced by the home directory; write $HOME"
    return f"{shown}: not an override ({reason}); write KEY=VALUE, with quotes where needed"


def _missing_choice(error: MissingConfigException) -> str:
    """`experiment=smoek` with the nearest choice there is."""
    group, _, choice = str(error.missing_cfg_file).rpartition("/")
    known = list(error.options or [])
    near = difflib.get_close_matches(choice, known, n=1)
    remedy = f"did you mean {near[0]}?" if near else f"use one of {', '.join(known)}"
    return f"{group}={choice}: no such recipe file; {remedy}"


def _no_choice(error: ValueError, overrides: Sequence[str]) -> str:
    """`model=null` among the overrides of groups."""
    groups = ", ".join(each.lstrip("+") for each in overrides if not each.startswith("++"))
    return f"{groups}: {error}; choose a file by its name, as in model=nvlm_d"


def _first_line(error: Exception) -> str:
    """Hydra's messages go on for lines about its search path; what went wrong comes first."""
    return " ".join(line.strip() for line in str(error).splitlines()[:4] if line.strip())


def _normalise(override: str, directories: tuple[Path, ...]) -> str:
    """Makes `a.b=1` mean "set, stated or not", so that our builder judges unknown keys, not Hydra.

    Fields with defaults in the schema need not be in a YAML file; Hydra would ask for a `+` there.
    """
    key, equals, _ = override.partition("=")
    if not equals or key.startswith(("+", "~", "hydra")):
        return override
    group = key.partition("@")[0]
    if any((directory / group).is_dir() for directory in directories):
        return f"+{override}" if group in _ADDITIVE else override
    return override if "@" in key else f"++{override}"


def _resolve_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _resolve_paths(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_resolve_paths(each) for each in value]
    return resolve_path(value) if isinstance(value, str) else value
