"""Kinds of rules on one key of a config.json. A family of models is a table of them.

An absent key means what transformers takes for that model type, so a rule states that default: a
config.json without `rms_norm_eps` is one with Qwen2's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from nvlm_train.convert.problem import Problems, error

Config = Mapping[str, Any]
"""A config.json."""


@dataclass(frozen=True)
class Place:
    """How messages name where things are."""

    setting: str
    """`model.language.weights=DIRECTORY`."""
    group: str
    """`model.language`."""
    config: str
    """The config.json."""
    model: str
    """What the code computes: `the vision encoder of NVLM`."""


class Rule(Protocol):
    """A rule on one key."""

    @property
    def key(self) -> str: ...

    def problems(self, config: Config, group: Any, place: Place) -> Problems:
        """What is wrong with the key, given the recipe's group."""
        ...


@runtime_checkable
class Tells(Protocol):
    """A rule that can be read backwards: from config.json to the recipe's field."""

    def fields(self, config: Config) -> Mapping[str, Any]:
        """The recipe's fields that the key decides, and the values that agree with it."""
        ...


def same(value: Any, wanted: Any) -> bool:
    """Equality as JSON and transformers see it: true is not 1, and a size is no float.

    >>> same(1, True), same(4.0, 4), same(10000, 10000.0)
    (False, False, True)
    """
    if isinstance(value, bool) or isinstance(wanted, bool):
        return value is wanted
    if isinstance(wanted, int) and not isinstance(value, int):
        return False
    return bool(value == wanted)


def shown(value: Any) -> str:
    """A value as config.json has it, strings without quotes.

    >>> shown(True), shown("gelu"), shown([8, 8])
    ('true', 'gelu', '[8, 8]')
    """
    return value if isinstance(value, str) else json.dumps(value)


def stated(config: Config, key: str, value: Any) -> str:
    """`key=value`, and whether it is only transformers' default.

    >>> stated({}, "hidden_size", 4096)
    'no hidden_size, which means hidden_size=4096'
    """
    text = f"{key}={shown(value)}"
    return text if key in config else f"no {key}, which means {text}"


def as_it_is(value: Any) -> Any:
    """How most keys are read."""
    return value


def edge(value: Any) -> Any:
    """The edge of a square that is written as a number or as [height, width]; others as they are.

    >>> edge([64, 64]), edge(64), edge([64, 32])
    (64, 64, [64, 32])
    """
    is_square = isinstance(value, list) and len(value) == 2 and same(value[0], value[1])
    return value[0] if is_square else value


@dataclass(frozen=True)
class Sized:
    """A key that must equal a field of the recipe."""

    key: str
    field: str
    default: Any
    read: Callable[[Any], Any] = as_it_is
    null_means: tuple[str, Any] | None = None
    """The key whose value null stands for, and that key's default; none where null is no value."""
    ours: Callable[[Any], Any] | None = None
    """The recipe's group to what the field means, where null stands for something else."""

    def fields(self, config: Config) -> Mapping[str, Any]:
        """The field as config.json has it."""
        value = config.get(self.key, self.default)
        meant = config.get(*self.null_means) if value is None and self.null_means else value
        return {self.field: self.read(meant)}

    def problems(self, config: Config, group: Any, place: Place) -> Problems:
        """The value in config.json is not the recipe's."""
        value = config.get(self.key, self.default)
        ours = self.ours(group) if self.ours else getattr(group, self.field)
        if not same(self.fields(config)[self.field], ours):
            yield error(
                f"{place.group}.{self.field}={ours} but {place.config} has "
                f"{stated(config, self.key, value)}",
                f"correct {place.group}, or give the weights that it describes",
            )


@dataclass(frozen=True)
class Fixed:
    """A key with values that the code computes; every other value is another model."""

    key: str
    allowed: tuple[Any, ...]
    default: Any

    def problems(self, config: Config, group: Any, place: Place) -> Problems:
        """The value is one that the code does not compute."""
        value = config.get(self.key, self.default)
        if not any(same(value, each) for each in self.allowed):
            wanted = " or ".join(shown(each) for each in self.allowed)
            yield error(
                f"{place.config} has {stated(config, self.key, value)}, {place.model} needs {wanted}",
                "give weights of such a model",
            )


@dataclass(frozen=True)
class Always:
    """A field of the recipe that has one value for every model of a family, whatever a key says."""

    key: str
    """`model_type`, which decides it."""
    field: str
    value: Any

    def fields(self, config: Config) -> Mapping[str, Any]:
        """The one value."""
        return {self.field: self.value}

    def problems(self, config: Config, group: Any, place: Place) -> Problems:
        """The recipe has another value."""
        ours = getattr(group, self.field)
        if not same(ours, self.value):
            yield error(
                f"{place.group}.{self.field}={shown(ours)} but {place.config} has "
                f"{self.key}={shown(config.get(self.key))}, for which it is {shown(self.value)}",
                f"set {place.group}.{self.field}={shown(self.value)}, or give other weights",
            )


@dataclass(frozen=True)
class Derived:
    """A key that repeats what follows from the recipe; transformers derives it where it is absent."""

    key: str
    allowed: Callable[[Any], tuple[Any, ...]]
    """The recipe's group to the values that say the same."""
    field: str | None = None
    """The field of the recipe that has the value, or null as the key has; none where there is no such."""

    def fields(self, config: Config) -> Mapping[str, Any]:
        """The field where the key is stated; elsewhere null, and it follows from other fields."""
        return {self.field: config.get(self.key)} if self.field else {}

    def problems(self, config: Config, group: Any, place: Place) -> Problems:
        """The value says something else."""
        if self.key not in config:
            return
        value, allowed = config[self.key], self.allowed(group)
        if not any(same(value, each) for each in allowed):
            yield error(
                f"{place.config} has {self.key}={shown(value)}, {place.model} as {place.group} "
                f"describes it needs {' or '.join(shown(each) for each in allowed)}",
                f"correct {place.group}, or give weights of such a model",
            )


@dataclass(frozen=True)
class TokenId:
    """A token's id that must be a row of the table: transformers cannot build the model otherwise."""

    key: str
    rows_key: str
    default_rows: int

    def problems(self, config: Config, group: Any, place: Place) -> Problems:
        """The id is no row."""
        value, rows = config.get(self.key), config.get(self.rows_key, self.default_rows)
        if value is None or not isinstance(rows, int):
            return
        if not isinstance(value, int) or isinstance(value, bool) or not -rows <= value < rows:
            yield error(
                f"{place.config} has {self.key}={shown(value)}, which is no row of a table with "
                f"{self.rows_key}={rows}",
                "correct config.json, or give the weights that it belongs to",
            )
