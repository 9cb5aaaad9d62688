"""Where a part lies: in a directory of its own, or in that of a whole vision-language model.

In a whole model config.json has a group for each part, and names of tensors begin with the part's prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from nvlm_train.convert.family import Family, key_problems, read_config
from nvlm_train.convert.headers import Headers, Stored, read_headers
from nvlm_train.convert.ignored import BOOKKEEPING, GENERATION
from nvlm_train.convert.keys import Config, Derived, Fixed, Place, Rule
from nvlm_train.convert.problem import Problem, error

PartName = Literal["vision", "language", "projector"]
PREFIXES: Mapping[PartName, tuple[str, ...]] = {
    "vision": ("vision_tower.", "vision_model.", "model.vision_tower."),
    "language": ("language_model.",),
    "projector": ("mlp1.",),
}
"""What names of a part's tensors begin with; files of one part may have kept it."""

_ARCHITECTURES = {
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
}


def _as_it_is(config: Config) -> Config:
    return config


def _by_architecture(config: Config) -> Config:
    """OpenGVLab's and NVIDIA's code look at `architectures`: NVLM-D's Qwen2 has model_type=llama."""
    # InternVL 2.5 and 3 say so of their Qwen2, which has no experts.
    config = {key: value for key, value in config.items() if (key, value) != ("moe_config", None)}
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    decided = _ARCHITECTURES.get(first) if isinstance(first, str) else None
    return {**config, "model_type": decided} if decided else config


@dataclass(frozen=True)
class Section:
    """One part of a whole model."""

    config: str | None
    """The key of config.json that describes it; None: the keys of the whole model do."""
    keys: tuple[Rule, ...] = ()
    """Keys of the whole model that decide what this part computes."""
    read: Callable[[Config], Config] = _as_it_is


@dataclass(frozen=True)
class Whole:
    """A vision-language model of others; parts that are not in `sections` are not read."""

    model_type: str
    sections: Mapping[PartName, Section]
    prefixes: tuple[str, ...]
    """Names of all its tensors begin with one of these."""
    ignored: frozenset[str]
    """Keys that change nothing of what its parts compute."""

    def family(self, part: PartName) -> Family:
        """The rules on its own keys, when one part is read."""
        keys = self.sections[part].keys
        others = {rule.key for each in self.sections.values() for rule in each.keys}
        groups = {each.config for each in self.sections.values() if each.config}
        return Family(
            model_type=self.model_type,
            keys=keys,
            ignored=self.ignored | others | groups,
            tensors={},
            sizes=lambda group: {},
            optional=lambda group: frozenset(),
        )


_OPENGVLAB: Mapping[PartName, Section] = {
    "vision": Section(
        "vision_config",
        (
            # Features of an earlier layer are those of an encoder with fewer layers.
            Fixed("select_layer", (-1,), -1),
            Fixed("use_backbone_lora", (0,), 0),
            # Another size stretches the learned positions.
            Derived("force_image_size", lambda vision: (None, vision.tile_size)),
        ),
    ),
    "language": Section("llm_config", (Fixed("use_llm_lora", (0,), 0),), _by_architecture),
    "projector": Section(
        None,
        (Fixed("downsample_ratio", (0.5,), 0.5), Fixed("ps_version", ("v2",), "v1")),
    ),
}
_OPENGVLAB_IGNORED = (
    BOOKKEEPING
    | GENERATION
    | {"architectures", "auto_map", "tie_word_embeddings", "pad_token_id", "is_decoder"}
    # How images are cut and prompts are written: the recipe says so.
    | {"dynamic_image_size", "max_dynamic_patch", "min_dynamic_patch", "use_thumbnail", "template"}
    | {"pad2square", "image_fold", "system_message", "hidden_size", "return_dict"}
)
_TRANSFORMERS_IGNORED = (
    BOOKKEEPING
    | GENERATION
    | {"architectures", "text_config", "tie_word_embeddings", "pad_token_id", "is_decoder"}
    | {"initializer_factor", "return_dict"}
)

WHOLES: Mapping[str, Whole] = {
    each.model_type: each
    for each in (
        Whole(
            "NVLM_D",
            _OPENGVLAB,
            ("vision_model.", "mlp1.", "language_model."),
            _OPENGVLAB_IGNORED,
        ),
        Whole(
            "internvl_chat",
            _OPENGVLAB,
            ("vision_model.", "mlp1.", "language_model."),
            _OPENGVLAB_IGNORED,
        ),
        Whole(
            "internvl",
            {"vision": Section("vision_config", (Fixed("vision_feature_layer", (-1,), -1),))},
            ("vision_tower.", "multi_modal_projector.", "language_model.", "model.", "lm_head."),
            _TRANSFORMERS_IGNORED
            | {"downsample_ratio", "image_seq_length", "image_token_id", "projector_hidden_act"}
            | {"vision_feature_select_strategy"},
        ),
        Whole(
            "siglip",
            {"vision": Section("vision_config")},
            ("vision_model.", "text_model.", "logit_scale", "logit_bias"),
            _TRANSFORMERS_IGNORED,
        ),
    )
}
"""By `model_type`: NVLM-D 72B, OpenGVLab's InternVL, transformers' InternVL, SigLIP with its text tower."""


@dataclass(frozen=True)
class Part:
    """What a directory has of one part."""

    headers: Headers
    """Its tensors, without the prefix, and the files' problems."""
    config: Config | Problem
    """What describes it."""
    place: Place
    """How messages name these."""
    problems: tuple[Problem, ...] = field(default=())
    """What is wrong with the whole model around it."""


def open_part(part: PartName, directory: Path, group: Any, place: Place) -> Part:
    """Reads the headers and the config of one part.

    Args:
        part: which.
        directory: a directory of this part alone, or of a whole model in `WHOLES`.
        group: the recipe's group, for keys of the whole model that repeat its fields.
        place: how messages name the directory; its `config` names the config.json.
    """
    headers = read_headers(directory, place.setting)
    config = read_config(directory / "config.json", place.setting)
    if isinstance(config, Problem):
        return Part(part_headers(part, headers, place.setting), config, place)
    whole = whole_of(config)
    if whole is None or part not in whole.sections:
        return Part(part_headers(part, headers, place.setting), config, place)
    section = whole.sections[part]
    problems = tuple(key_problems(whole.family(part), config, group, place))
    own = _within(headers, part, whole, place.setting)
    if section.config is None:
        return Part(own, config, place, problems)
    inside = config.get(section.config)
    if not isinstance(inside, dict):
        missing = error(
            f"{place.setting}: config.json has no group {section.config}",
            "add the config.json that lies beside these weights",
        )
        return Part(own, missing, place, problems)
    named = replace(place, config=f"{place.config} ({section.config})")
    return Part(own, section.read(inside), named, problems)


def whole_of(config: Config) -> Whole | None:
    """The whole model that a config.json describes; None for one of a part alone."""
    name = config.get("model_type")
    return WHOLES.get(name) if isinstance(name, str) else None


def part_headers(part: PartName, headers: Headers, setting: str) -> Headers:
    """The tensors of a part, by names alone: those with its prefix, or all where none has it."""
    found = _own(part, headers)
    return _joined(found, headers.tensors.keys() - _full_names(found), headers, setting)


def own_tensors(part: PartName, headers: Headers) -> Mapping[str, Stored]:
    """Only those with the part's prefix, or all where none has it, by their names without it."""
    return _own(part, headers) or headers.tensors


def _within(headers: Headers, part: PartName, whole: Whole, setting: str) -> Headers:
    """The part's tensors in a whole model, and those that belong to none of its parts."""
    found = _own(part, headers)
    others = {name for name in headers.tensors if not name.startswith(whole.prefixes)}
    return _joined(found, others, headers, setting)


def _own(part: PartName, headers: Headers) -> dict[str, Stored]:
    for prefix in PREFIXES[part]:
        named = [name for name in headers.tensors if name.startswith(prefix)]
        if named:
            return {
                name.removeprefix(prefix): replace(headers.tensors[name], prefix=prefix)
                for name in named
            }
    return {}


def _full_names(tensors: Mapping[str, Stored]) -> set[str]:
    return {stored.prefix + name for name, stored in tensors.items()}


def _joined(
    own: Mapping[str, Stored], others: Iterable[str], headers: Headers, setting: str
) -> Headers:
    """The part's tensors and others under their full names, which the check of tensors then refuses."""
    rest = sorted(others)
    problems = [
        error(
            f"{setting}: {name} is there with and without {own[name].prefix}",
            "leave the tensors of one checkpoint in the file",
        )
        for name in rest
        if name in own
    ]
    tensors = {**{name: headers.tensors[name] for name in rest}, **own}
    return Headers(tensors, headers.problems + problems[:1], headers.unread)
