"""What config.json says of a model: the tables that check weights, read backwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from nvlm_train.config.build import build
from nvlm_train.config.schema import LanguageConfig, VisionConfig
from nvlm_train.convert.family import Family, family_of, key_problems, read_config
from nvlm_train.convert.keys import Config, Place
from nvlm_train.convert.language import FAMILIES
from nvlm_train.convert.problem import Problem
from nvlm_train.convert.vision import KINDS
from nvlm_train.errors import ConfigError

SIZES: Mapping[str, tuple[str, ...]] = {
    "model.vision": (
        "kind", "num_layers", "hidden_size", "num_heads", "ffn_hidden_size", "tile_size", "patch_size",
        "norm_eps",
    ),
    "model.language": (
        "num_layers", "hidden_size", "num_heads", "num_kv_heads", "ffn_hidden_size", "vocab_size",
        "num_tokens", "norm_eps", "head_dim", "rope_theta", "rope_scaling", "qkv_bias", "qk_norm",
        "tied_embeddings",
    ),
}  # fmt: skip
"""Fields of the recipe that weights decide, by group."""


def described(group: str, directory: Path, setting: str) -> dict[str, Any]:
    """Reads the sizes of a part of a model from its config.json.

    Args:
        group: `model.vision` or `model.language`.
        directory: as save_pretrained or the hub leaves it.
        setting: what names the directory, for messages.

    Returns:
        The fields of `SIZES` that config.json decides, as it has them, right or wrong.

    Raises:
        ConfigError: it has no config.json, or one of a model that is not read.
    """
    config = read_config(directory / "config.json", setting)
    if isinstance(config, Problem):
        raise ConfigError([str(config)])
    place = Place(setting, group, str(directory / "config.json"), NAMES[group])
    found = READERS[group](config, place)
    if isinstance(found, Problem):
        raise ConfigError([str(found)])
    return found


def _language(config: Config, place: Place) -> dict[str, Any] | Problem:
    family = family_of(FAMILIES, config, place)
    if isinstance(family, Problem):
        return family
    return {"vocab_size": config.get("vocab_size", family.rows), **family.fields(config)}


def _vision(config: Config, place: Place) -> dict[str, Any] | Problem:
    """The kind whose rules config.json breaks least: none, where one fits."""
    kinds = {name: kind for name, kind in KINDS.items() if kind.model_type == config.get("model_type")}
    if not kinds:
        known = family_of({kind.model_type: kind for kind in KINDS.values()}, config, place)
        assert isinstance(known, Problem)
        return known
    name = min(kinds, key=lambda name: _broken(kinds[name], name, config, place))
    return {"kind": name, **kinds[name].fields(config)}


def _broken(kind: Family, name: str, config: Config, place: Place) -> int:
    try:
        vision = build(VisionConfig, {"kind": name, **kind.fields(config)})
    except ConfigError as error:
        return len(error.problems)
    return len(list(key_problems(kind, config, vision, place)))


Reader = Callable[[Config, Place], dict[str, Any] | Problem]
READERS: Mapping[str, Reader] = {"model.vision": _vision, "model.language": _language}
NAMES = {"model.vision": "the vision encoder of NVLM", "model.language": "the language model of NVLM"}


def shown(group: VisionConfig | LanguageConfig) -> str:
    """A group of the recipe in one line: every field that is not null.

    >>> shown(VisionConfig(2, 32, 4, 64, 32, 8))[:31]
    'num_layers=2 hidden_size=32 num'
    """
    values = ((each.name, getattr(group, each.name)) for each in fields(group))
    return " ".join(f"{name}={value}" for name, value in values if value is not None)
