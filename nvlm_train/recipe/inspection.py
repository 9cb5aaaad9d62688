"""What a directory of weights is: its parts, their sizes, what fits and what does not, and why."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvlm_train.config.build import build
from nvlm_train.config.layouts import padded_rows
from nvlm_train.config.model_schema import LanguageConfig, VisionConfig
from nvlm_train.config.ranges import divisors, use
from nvlm_train.config.shapes import language_shapes_fit, vision_shapes_fit
from nvlm_train.convert.family import has_model_type, read_config
from nvlm_train.convert.keys import Config, shown
from nvlm_train.convert.language import FAMILIES, language_problems
from nvlm_train.convert.problem import Problem, error
from nvlm_train.convert.vision import KINDS, vision_problems
from nvlm_train.convert.whole.parts import WHOLES, whole_of
from nvlm_train.errors import ConfigError
from nvlm_train.recipe import sizes

Group = VisionConfig | LanguageConfig


@dataclass(frozen=True)
class Found:
    """One part of a model in a directory."""

    group: str
    """The group of the recipe that it can fill: `model.vision` or `model.language`."""
    family: str
    """Its `model_type`, and where it is one of a whole model, that of the whole."""
    sizes: Group | None
    """As the recipe would have them; none where config.json has none that can be read."""
    problems: tuple[Problem, ...]
    has_projector: bool = False
    """Whether a projector that can be read lies beside it."""

    @property
    def fits(self) -> bool:
        return not any(each.level == "error" for each in self.problems)


def inspect(directory: Path) -> list[Found]:
    """Looks at config.json and the headers of the files, and at no tensor but those of dummy heads.

    Raises:
        ConfigError: there is no config.json, or it is one of a model of which nothing is read.
    """
    config = read_config(directory / "config.json", str(directory))
    if isinstance(config, Problem):
        raise ConfigError([str(config)])
    groups = [group for group, part in sizes.PARTS.items() if _has(part.name, config)]
    if not groups:
        raise ConfigError([_unknown(directory, config)])
    return [_inspect(group, directory, config) for group in groups]


def _has(part: str, config: Config) -> bool:
    whole, named = whole_of(config), config.get("model_type")
    if whole is not None:
        return part in whole.sections
    return isinstance(named, str) and named in KNOWN[part]


KNOWN: Mapping[str, frozenset[str]] = {
    "language": frozenset(FAMILIES),
    "vision": frozenset(each.files.model_type for kind in KINDS.values() for each in kind),
}
"""By part, the `model_type` of what is read."""


def _has_projector(config: Config) -> bool:
    """Only NVLM-D's has no biases, as ours."""
    return config.get("model_type") == "NVLM_D"


def _unknown(directory: Path, config: Config) -> str:
    known = "; ".join(f"{part}: {', '.join(sorted(names))}" for part, names in KNOWN.items())
    return (
        f"{directory}/config.json has {has_model_type(config)}, which is read neither as a "
        f"language model nor as a vision encoder; use one of these ({known}; "
        f"whole models: {', '.join(sorted(WHOLES))})"
    )


def _inspect(group: str, directory: Path, config: Config) -> Found:
    setting = f"{group}.from={directory}"
    own = sizes.section_of(config, sizes.PARTS[group].name, setting)
    named = own.get("model_type") if not isinstance(own, Problem) else None
    family = f"model_type={shown(named)}"
    if whole_of(config) is not None:
        family += f", in a whole {shown(config['model_type'])}"
    fields: dict[str, Any] = {"weights": str(directory)}
    try:
        fields |= sizes.described(group, directory, setting)
        found = build(SCHEMAS[group], fields, path=group)
    except ConfigError as problems:
        lines = tuple(
            error(each, "give whole weights of a model that is read") for each in problems.problems
        )
        return Found(group, family, None, lines)
    has_projector = group == "model.language" and _has_projector(config)
    return Found(group, family, found, tuple(_problems(found)), has_projector)


SCHEMAS: Mapping[str, type[Group]] = {
    "model.vision": VisionConfig,
    "model.language": LanguageConfig,
}


def _problems(found: Group) -> Iterator[Problem]:
    if isinstance(found, VisionConfig):
        shapes, others = vision_shapes_fit(found), vision_problems(found)
    else:
        shapes, others = language_shapes_fit(found), language_problems(found, {})
    wrong = [error(each, "it is not computed here") for each in shapes]
    yield from wrong
    # Tables of tensors are made of sizes that fit.
    yield from () if wrong else others


def report(found: Found) -> Iterator[str]:
    """What is said of a part, line by line."""
    yield f"{found.group}: {found.family}"
    if found.sizes is not None:
        yield f"  sizes: {sizes.shown(found.sizes, sizes.SIZES[found.group])}"
    if found.fits and found.sizes is not None:
        yield from (f"  {line}" for line in possible(found.sizes))
    for problem in found.problems:
        yield f"  {problem.level}: {problem}"
    if found.fits and found.sizes is not None:
        yield "  fits: every key of config.json and every tensor is accounted for"
        yield f"  to start from it: {found.group}.from={found.sizes.weights}"
        if found.has_projector:
            yield f"  its projector, for an NVLM-D: model.projector.weights={found.sizes.weights}"


def possible(group: Group) -> Iterator[str]:
    """What a part can be used with: tokens of a tile, or layouts."""
    if isinstance(group, VisionConfig):
        side = group.tile_size // group.patch_size
        yield f"tiles: {group.tile_size} x {group.tile_size} pixels, {side * side // 4} tokens each"
        return

    def words(numbers: list[int]) -> str:
        return use(numbers).removeprefix("use ")

    cut = math.gcd(group.num_heads, group.num_kv_heads, group.ffn_hidden_size)
    yield (
        f"layouts: parallel.tensor {words(divisors(cut))} (heads, KV heads and feed-forward), "
        f"parallel.pipeline {words(divisors(group.num_layers))} (layers)"
    )
    uneven = [size for size in divisors(cut) if group.vocab_size % size]
    if uneven:
        padded = padded_rows(group.vocab_size, uneven)
        yield (
            f"vocabulary: parallel.tensor {words(uneven)} does not divide its {group.vocab_size} rows; "
            f"for all of these `from` pads them to {padded}, with rows that are never predicted"
        )
