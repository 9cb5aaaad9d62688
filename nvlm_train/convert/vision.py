"""The vision encoders whose weights are read: the table of kinds, and a directory against the recipe.

A layout in which a kind's weights are published is a table in `encoders/`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from nvlm_train.config.model_schema import VisionConfig
from nvlm_train.convert.encoders.dummy_heads import dummy_head_problems
from nvlm_train.convert.encoders.intern_vit import INTERN_VIT_6B, INTERN_VIT_300M
from nvlm_train.convert.encoders.layout import Layout
from nvlm_train.convert.encoders.opengvlab import OPENGVLAB_6B, OPENGVLAB_300M
from nvlm_train.convert.encoders.siglip import SIGLIP
from nvlm_train.convert.family import Family, family_of, key_problems, tensor_problems
from nvlm_train.convert.headers import Stored
from nvlm_train.convert.keys import Config, Place
from nvlm_train.convert.problem import Problem, Problems, error
from nvlm_train.convert.whole.parts import Part, open_part
from nvlm_train.errors import ConfigError

KINDS: Mapping[str, tuple[Layout, ...]] = {
    "intern_vit_6b": (INTERN_VIT_6B, OPENGVLAB_6B),
    "intern_vit_300m": (INTERN_VIT_300M, OPENGVLAB_300M),
    "siglip": (SIGLIP,),
}
"""`model.vision.kind` to the layouts that are read. The first names what the encoder holds: parameters are
counted from it, and the others' tensors are its own, moved or cut.

`vision.encoder.KINDS` has the same keys."""


def kind_of(vision: VisionConfig) -> Family:
    """Looks up the encoder's tensors and the keys of its config.json.

    Raises:
        ConfigError: the recipe names a kind that is not in the table.
    """
    problems = [str(each) for each in kind_problems(vision)]
    if problems:
        raise ConfigError(problems)
    return KINDS[vision.kind][0].files


def kind_problems(vision: VisionConfig) -> Problems:
    """Finds a kind that is not in the table."""
    if vision.kind not in KINDS:
        yield error(
            f"model.vision.kind={vision.kind} is no kind of vision encoder",
            f"use {' or '.join(KINDS)}",
        )


def vision_problems(vision: VisionConfig) -> Problems:
    """What keeps `model.vision.weights` from being what the recipe's encoder computes."""
    kind_of(vision)
    part = _open(vision)
    yield from part.headers.problems
    yield from part.problems
    if isinstance(part.config, Problem):
        yield part.config
        return
    setting = f"model.vision.weights={vision.weights}"
    others = list(_other_kind(part.config, vision, part.place))
    yield from others
    family = family_of(_families(KINDS[vision.kind]), part.config, part.place)
    if isinstance(family, Problem):
        if not others:
            yield replace(family, text=f"{setting}: {family.text}")
        return
    for problem in key_problems(family, part.config, vision, part.place):
        yield replace(problem, text=f"{setting}: {problem.text}")
    if part.headers.tensors:
        yield from _tensor_problems(family, part, part.config, vision)


def encoder_files(vision: VisionConfig) -> tuple[Layout, Mapping[str, Stored]]:
    """The layout of `model.vision.weights`, in which nothing is wrong, and its tensors by name."""
    part = _open(vision)
    assert not isinstance(part.config, Problem), part.config
    layout = _layout(str(part.config.get("model_type")), vision, part.headers.tensors)
    return layout, part.headers.tensors


def _open(vision: VisionConfig) -> Part:
    directory = Path(vision.weights or "")
    place = Place(
        setting=f"model.vision.weights={directory}",
        group="model.vision",
        config="config.json",
        model="the vision encoder of NVLM",
    )
    return open_part("vision", directory, vision, place)


def _families(layouts: Sequence[Layout]) -> dict[str, Family]:
    return {layout.files.model_type: layout.files for layout in layouts}


def _layout(model_type: str, vision: VisionConfig, tensors: Mapping[str, Stored]) -> Layout:
    """The kind's layout that a model_type names, with the dummy heads of the files."""
    (found,) = (each for each in KINDS[vision.kind] if each.files.model_type == model_type)
    return found.with_dummy_heads(vision, tensors)


def _tensor_problems(family: Family, part: Part, config: Config, vision: VisionConfig) -> Problems:
    layout = _layout(family.model_type, vision, part.headers.tensors)
    found = list(tensor_problems(layout.files, part.headers, config, vision, part.place))
    yield from found
    # The contents of tensors that are there, whole and of the right shape.
    if not part.headers.problems and not any(each.level == "error" for each in found):
        yield from dummy_head_problems(layout, vision, part.headers.tensors, part.place)


def _other_kind(config: Config, vision: VisionConfig, place: Place) -> Problems:
    """Finds that the config.json is one of another kind in the table."""
    fitting = list(dict.fromkeys(_fitting(config, vision, place)))
    if fitting and vision.kind not in fitting:
        yield error(
            f"{place.setting}: {place.config} describes kind={fitting[0]}, not "
            f"model.vision.kind={vision.kind}",
            f"set model.vision.kind={fitting[0]}",
        )


def _fitting(config: Config, vision: VisionConfig, place: Place) -> Iterator[str]:
    """Kinds that a config.json describes with the recipe's sizes."""
    for name, layouts in KINDS.items():
        family = _families(layouts).get(str(config.get("model_type")))
        if family and not any(key_problems(family, config, vision, place)):
            yield name
