"""A model as tables of data, and the check of a directory of weights against it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvlm_train.convert.headers import Headers, Stored
from nvlm_train.convert.keys import Config, Place, Rule, Tells, shown
from nvlm_train.convert.problem import Problem, Problems, error, warning
from nvlm_train.convert.rope import Rope

FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Tensors that can be read as they are, under safetensors' and torch's names of their dtypes.
Smaller ones are quantised: their values need scales that lie elsewhere."""
_DTYPE_KEYS = ("dtype", "torch_dtype")
"""transformers 5 writes the first, 4 the second."""


@dataclass(frozen=True)
class Family:
    """What a model's config.json may say, and which tensors it has."""

    model_type: str
    keys: tuple[Rule, ...]
    ignored: frozenset[str]
    """Keys that change nothing that is computed."""
    tensors: Mapping[str, tuple[str | int, ...]]
    """Name, `{n}` for the layer, to dimensions: numbers, or keys of `sizes`."""
    sizes: Callable[[Any], Mapping[str, int]]
    """The recipe's group to sizes. `layers` counts the names with `{n}`; a vision encoder's `positions` are
    the tokens of a tile that its layers see, from which its FLOPs follow (costs.py)."""
    optional: Callable[[Any], frozenset[str]]
    """The recipe's group to names of `tensors` that its model does not have."""
    harmless: tuple[str, ...] = ()
    """Tensors that may be there and are not used, because they are computed again."""
    padded: str | None = None
    """The size that may be smaller in the files: the recipe pads a table with rows of zeros."""
    rows: int | None = None
    """transformers' default of `vocab_size`; none for models without words."""
    rope: Rope | None = None
    lengths: Callable[[Config, Mapping[str, int], Place], Problems] | None = None
    """Further rules on the lengths of stages' sequences in tokens; none where there are none."""

    def fields(self, config: Config) -> dict[str, Any]:
        """The recipe's fields as a config.json decides them: its rules read backwards.

        Values are as they stand there, right or wrong; building the recipe finds wrong types.
        """
        found: dict[str, Any] = {}
        for rule in self.keys:
            found |= rule.fields(config) if isinstance(rule, Tells) else {}
        return found | (self.rope.fields(config) if self.rope else {})

    def shapes(self, group: Any) -> dict[str, tuple[int, ...]]:
        """Lists every tensor that the model has with the recipe's sizes, by name."""
        sizes, optional = self.sizes(group), self.optional(group)
        return {
            name: tuple(dim if isinstance(dim, int) else sizes[dim] for dim in dims)
            for pattern, dims in self.tensors.items()
            if pattern not in optional
            for name in _names(pattern, sizes["layers"])
        }

    def layer_weights(self, group: Any) -> int:
        """Counts the matrix entries of one layer: what a token is multiplied with in it."""
        sizes = self.sizes(group)
        return sum(
            math.prod(dim if isinstance(dim, int) else sizes[dim] for dim in dims)
            for pattern, dims in self.tensors.items()
            if "{n}" in pattern and len(dims) == 2
        )

    def known(self) -> frozenset[str]:
        """Every key of config.json that is accounted for."""
        rotary = self.rope.keys if self.rope else frozenset()
        return (
            self.ignored | rotary | {rule.key for rule in self.keys} | {"model_type", *_DTYPE_KEYS}
        )


def read_config(path: Path, setting: str) -> Config | Problem:
    """The config.json, or why there is none."""
    if not path.parent.is_dir():
        why = "that is a file" if path.parent.exists() else "no such directory"
        return error(
            f"{setting}: no config.json there: {why}",
            "give the whole path of a directory that save_pretrained or the hub left",
        )
    if not path.is_file():
        return error(
            f"{setting}: no config.json there, so its sizes cannot be checked",
            "add the one that save_pretrained wrote",
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        return error(f"{path} cannot be read: {problem}", "add the one that save_pretrained wrote")
    if not isinstance(config, dict):
        return error(f"{path} is no JSON object", "add the one that save_pretrained wrote")
    return config


_NOT_READ: Mapping[str, str] = dict.fromkeys(
    ("siglip2", "siglip2_vision_model"),
    "a SigLIP 2 that stretches its positions to images of any shape (NaFlex), while tiles are square; "
    "one of a fixed size has model_type=siglip",
)
"""Models that look like one that is read, and why they are not."""


def has_model_type(config: Config) -> str:
    """What a config.json says of its family, for messages, and the reason where that one is not read."""
    name = config.get("model_type")
    reason = _NOT_READ.get(name) if isinstance(name, str) else None
    has = f"model_type={shown(name)}" if "model_type" in config else "no model_type"
    return f"{has} ({reason})" if reason else has


def family_of(families: Mapping[str, Family], config: Config, place: Place) -> Family | Problem:
    """The family that a config.json names."""
    name = config.get("model_type")
    if isinstance(name, str) and name in families:
        return families[name]
    return error(
        f"{place.config} has {has_model_type(config)}, {place.model} reads "
        f"model_type={' or '.join(families)}",
        "give weights of such a model: another one has the same sizes and computes something else",
    )


def key_problems(family: Family, config: Config, group: Any, place: Place) -> Problems:
    """Keys whose values are not what the code computes, and keys that nobody knows."""
    for rule in family.keys:
        yield from rule.problems(config, group, place)
    for key in _DTYPE_KEYS:
        value = config.get(key)
        if value is not None and value not in FLOATS.values():
            yield error(
                f"{place.config} has {key}={shown(value)}, weights are read in "
                f"{', '.join(FLOATS.values())}",
                "give weights that are not quantised",
            )
    new, old = (config.get(key) for key in _DTYPE_KEYS)
    if new is not None and old is not None and new != old:
        yield error(
            f"{place.config} has dtype={shown(new)} and torch_dtype={shown(old)}",
            "leave the one that the tensors have",
        )
    for key in sorted(config.keys() - family.known()):
        yield error(
            f"{place.config} has {key}={shown(config[key])}, a key that is not known here, "
            "and may change what the model computes",
            f"remove {key} from a copy of config.json if the model does not read it; otherwise "
            "give weights of a model without it",
        )


def tensor_problems(
    family: Family, headers: Headers, config: Config, group: Any, place: Place
) -> Problems:
    """Tensors that lack, that would be left out, or that have another shape or dtype.

    Each kind (a name without its layer) is shown once.
    """
    wanted = family.shapes(group)
    stored = headers.tensors
    missing = [name for name in wanted if name not in stored]
    if missing and not headers.unread:
        yield error(
            f"{place.setting}: no tensor named {missing[0]}; missing={_one_of_each(missing)}, "
            f"{len(missing)} in all",
            f"give weights of {place.model} as {place.group} describes it",
        )
    unexpected = [name for name in stored if name not in wanted and not _is_harmless(family, name)]
    if unexpected:
        yield error(
            f"{place.setting}: unexpected={_one_of_each(unexpected)}, {len(unexpected)} in all: "
            f"{place.model} as {place.group} describes it has no such tensors, so that what they "
            "do would be left out",
            f"correct {place.group}, or give weights of such a model",
        )
    used = {name: stored[name] for name in wanted if name in stored}
    yield from _shape_problems(family, used, wanted, place)
    yield from _dtype_problems(used, config, place)


def _shape_problems(
    family: Family,
    used: Mapping[str, Stored],
    wanted: Mapping[str, tuple[int, ...]],
    place: Place,
) -> Problems:
    wrong = [name for name in used if not _fits(family, name, used[name].shape, wanted[name])]
    for name in _one_of_each(wrong):
        yield error(
            f"{place.setting}: {name} gives {used[name].shape} for what in the recipe's model "
            f"has {wanted[name]}",
            f"correct the sizes in {place.group}",
        )


def _fits(family: Family, name: str, have: tuple[int, ...], want: tuple[int, ...]) -> bool:
    """Equal shapes; a table that the recipe pads may have fewer rows in the file."""
    if len(have) != len(want) or have[1:] != want[1:]:
        return False
    is_table = family.padded is not None and family.tensors.get(name, ("",))[0] == family.padded
    return have[:1] <= want[:1] if is_table else have == want


def _dtype_problems(used: Mapping[str, Stored], config: Config, place: Place) -> Problems:
    quantised = [name for name, tensor in used.items() if tensor.dtype not in FLOATS]
    for name in _one_of_each(quantised):
        yield error(
            f"{place.setting}: {name} has dtype={used[name].dtype}, weights are read in "
            f"{', '.join(FLOATS)}",
            "give weights that are not quantised",
        )
    there = {FLOATS[tensor.dtype] for tensor in used.values() if tensor.dtype in FLOATS}
    for key in _DTYPE_KEYS:
        value = config.get(key)
        if value in FLOATS.values() and there and value not in there:
            yield warning(
                f"{place.config} has {key}={value}, the tensors are {' and '.join(sorted(there))}",
                "training computes in the recipe's precision; transformers would round the weights",
            )


def _names(pattern: str, layers: int) -> Iterator[str]:
    if "{n}" not in pattern:
        yield pattern
        return
    for number in range(layers):
        yield pattern.replace("{n}", str(number))


def _is_harmless(family: Family, name: str) -> bool:
    return re.sub(r"\.\d+\.", ".{n}.", name) in family.harmless


def _one_of_each(names: Iterable[str]) -> list[str]:
    """The first name of each kind.

    >>> _one_of_each(["layers.0.bias", "layers.1.bias", "norm"])
    ['layers.0.bias', 'norm']
    """
    first: dict[str, str] = {}
    for name in names:
        first.setdefault(re.sub(r"\.\d+\.", ".{n}.", name), name)
    return list(first.values())
