"""What config.json says of a model: the tables that check weights, read backwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvlm_train.config.build import build
from nvlm_train.config.model_schema import LanguageConfig, ProjectorConfig, VisionConfig
from nvlm_train.convert.family import Family, family_of, key_problems, read_config
from nvlm_train.convert.keys import Config, Place
from nvlm_train.convert.language import FAMILIES
from nvlm_train.convert.problem import Problem, error
from nvlm_train.convert.vision import KINDS
from nvlm_train.convert.whole.parts import PartName, whole_of
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
    """Reads the sizes of a part of a model from its config.json, or from that of a whole model.

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
    part = PARTS[group]
    own = config if isinstance(config, Problem) else section_of(config, part.name, setting)
    place = Place(setting, group, str(directory / "config.json"), part.model)
    found = own if isinstance(own, Problem) else part.read(own, place)
    if isinstance(found, Problem):
        raise ConfigError([str(found)])
    return found


def section_of(config: Config, part: PartName, setting: str) -> Config | Problem:
    """The config.json of a part, which is a group of it where it is one of a whole model."""
    whole = whole_of(config)
    if whole is None or part not in whole.sections:
        return config
    section = whole.sections[part]
    inside = config.get(section.config) if section.config else config
    if not isinstance(inside, dict):
        return error(
            f"{setting}: config.json has no group {section.config}",
            "add the config.json that lies beside these weights",
        )
    return section.read(inside)


def _language(config: Config, place: Place) -> dict[str, Any] | Problem:
    family = family_of(FAMILIES, config, place)
    if isinstance(family, Problem):
        return family
    return {"vocab_size": config.get("vocab_size", family.rows), **family.fields(config)}


def _vision(config: Config, place: Place) -> dict[str, Any] | Problem:
    """The kind whose rules config.json breaks least: none, where one fits."""
    named = config.get("model_type")
    layouts = [(kind, layout.files) for kind, each in KINDS.items() for layout in each]
    fitting = [(kind, files) for kind, files in layouts if files.model_type == named]
    if not fitting:
        known = family_of({files.model_type: files for _, files in layouts}, config, place)
        assert isinstance(known, Problem)
        return known
    kind, files = min(fitting, key=lambda each: _broken(each[0], each[1], config, place))
    return {"kind": kind, **files.fields(config)}


def _broken(kind: str, files: Family, config: Config, place: Place) -> int:
    """Counts the rules that config.json breaks as one of this kind."""
    try:
        vision = build(VisionConfig, {"kind": kind, **files.fields(config)})
    except ConfigError as problems:
        return len(problems.problems)
    return len(list(key_problems(files, config, vision, place)))


@dataclass(frozen=True)
class Readable:
    """A part of a model whose sizes can be read."""

    name: PartName
    model: str
    """What messages call it."""
    read: Callable[[Config, Place], dict[str, Any] | Problem]


PARTS: Mapping[str, Readable] = {
    "model.vision": Readable("vision", "the vision encoder of NVLM", _vision),
    "model.language": Readable("language", "the language model of NVLM", _language),
}
"""By group of the recipe."""


def shown(group: VisionConfig | ProjectorConfig | LanguageConfig, names: Iterable[str] = ()) -> str:
    """Fields of a group in one line, those that are null left out.

    Args:
        group: of the recipe.
        names: fields; all where none is named.

    >>> shown(VisionConfig(2, 32, 4, 64, 32, 8), ["num_layers", "weights", "kind"])
    'num_layers=2 kind=intern_vit_6b'
    """
    values = ((name, getattr(group, name)) for name in names or vars(group))
    return " ".join(f"{name}={value}" for name, value in values if value is not None)
