"""Rotary position parameters, as transformers 4 (`rope_theta`, `rope_scaling`) and 5 write them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nvlm_train.config.model_schema import LanguageConfig
from nvlm_train.convert.keys import Config, Place, same, shown, stated
from nvlm_train.convert.problem import Problems, error, warning

_TABLES = ("rope_scaling", "rope_parameters")
"""Where parameters stand: transformers 4 writes the first, 5 the second, and the first one wins."""
_TYPE_KEYS = ("rope_type", "type")
"""The second is how transformers named it at first; the first one wins."""
_ONE = "leave the one that the weights were trained with"


@dataclass(frozen=True)
class RopeType:
    """A kind of scaling in a config.json."""

    parameters: Mapping[str, str | None]
    """Numbers that it needs, each with the field of the recipe's `rope_scaling` that must say the same;
    none for a number that changes nothing up to `max_position_embeddings`."""
    is_bounded: bool = False
    """Whether it changes RoPE beyond that length."""
    scaling: str | None = None
    """The recipe's `rope_scaling.kind` that computes it; none where frequencies stay as they are."""


PLAIN = {
    "default": RopeType({}),
    # base * (factor * S / max - (factor - 1)) ** ..., S = max(longest, max): base itself up to max
    # (transformers, modeling_rope_utils._compute_dynamic_ntk_parameters). NVLM-D 72B has it.
    "dynamic": RopeType({"factor": None}, is_bounded=True),
}
"""Kinds that leave the frequencies as `rope_theta` gives them."""

STRETCHED = {
    "linear": RopeType({"factor": "factor"}, scaling="linear"),
    "llama3": RopeType(
        {
            "factor": "factor",
            "low_freq_factor": "low_freq_factor",
            "high_freq_factor": "high_freq_factor",
            "original_max_position_embeddings": "original_max_positions",
        },
        scaling="llama3",
    ),
}
"""Kinds that `model.language.rope_scaling` describes (nvlm_train/model/attention/rope.py computes them)."""


@dataclass(frozen=True)
class _Table:
    """The parameters that transformers reads, under the name that they have in config.json."""

    name: str
    content: Config

    @property
    def type(self) -> Any:
        """The kind of scaling; `default` where none is stated."""
        return next((self.content[key] for key in _TYPE_KEYS if key in self.content), "default")

    def path(self, key: str) -> str:
        """A parameter's place in config.json."""
        return f"{self.name}.{key}"


@dataclass(frozen=True)
class Rope:
    """What a family's RoPE may be, and what absent keys mean."""

    types: Mapping[str, RopeType]
    theta: float
    max_positions: int

    keys = frozenset(
        {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"}
        | {"max_position_embeddings"}
    )
    """Keys of config.json that these rules account for."""

    def fields(self, config: Config) -> dict[str, Any]:
        """The recipe's `rope_theta` and `rope_scaling` as config.json has them.

        Of a table that `problems` refuses, whatever can be read of it.
        """
        tables = [config[key] for key in _TABLES if isinstance(config.get(key), dict)]
        content: Config = next((each for each in tables if each), {})
        table = _Table("", content)
        kind = self.types.get(table.type) if isinstance(table.type, str) else None
        scaling = None
        if kind is not None and kind.scaling is not None:
            own = {field: content.get(key) for key, field in kind.parameters.items() if field}
            scaling = {"kind": kind.scaling} | own
        theta = content.get("rope_theta", config.get("rope_theta", self.theta))
        return {"rope_theta": theta, "rope_scaling": scaling}

    def problems(
        self,
        config: Config,
        language: LanguageConfig,
        place: Place,
        sequence_lengths: Mapping[str, int],
    ) -> Problems:
        """Finds what is not the RoPE that the recipe describes.

        Args:
            config: the config.json.
            language: the recipe's group.
            place: how messages name things.
            sequence_lengths: stage to its sequence length in tokens.
        """
        for key in _TABLES:
            value = config.get(key)
            if value is not None and not isinstance(value, dict):
                yield error(
                    f"{place.config} has {key}={shown(value)}, which is no table of parameters",
                    "give weights with a config.json that save_pretrained wrote",
                )
                return
        stated_tables = [key for key in _TABLES if config.get(key)]
        if len(stated_tables) == 2 and config[_TABLES[0]] != config[_TABLES[1]]:
            both = " and ".join(f"{key}={shown(config[key])}" for key in _TABLES)
            yield error(
                f"{place.config} has {both}, of which transformers 5 reads the first alone", _ONE
            )
        name = stated_tables[0] if stated_tables else ""
        table = _Table(name, config.get(name) or {})
        yield from self._theta(config, table, language, place)
        yield from self._rotary_part(config, table, place)
        kind = self.types.get(table.type) if isinstance(table.type, str) else None
        if kind is None:
            yield error(
                f"{place.config} has RoPE of the type {shown(table.type)}: {name}="
                f"{shown(table.content)}, {place.model} needs {' or '.join(self.types)}",
                "give weights of such a model",
            )
            return
        yield from _parameters(table, kind, place)
        yield from _scaling(table, kind, language, place)
        yield from self._lengths(config, kind, table.type, place, sequence_lengths)

    def _theta(
        self, config: Config, table: _Table, language: LanguageConfig, place: Place
    ) -> Problems:
        inside, above = table.content.get("rope_theta"), config.get("rope_theta")
        has_inside, has_above = "rope_theta" in table.content, "rope_theta" in config
        theta = inside if has_inside else above if has_above else self.theta
        if not same(theta, language.rope_theta):
            where = table.path("rope_theta") if has_inside else "rope_theta"
            has = f"{where}={shown(theta)}"
            if not has_inside and not has_above:
                has = f"no rope_theta, neither by itself nor in {' or '.join(_TABLES)}, which means {has}"
            yield error(
                f"{place.group}.rope_theta={language.rope_theta} but {place.config} has {has}",
                f"correct {place.group}, or give the weights that it describes",
            )
        if has_inside and has_above and not same(inside, above):
            yield error(
                f"{place.config} has rope_theta={shown(above)} and "
                f"{table.path('rope_theta')}={shown(inside)}",
                _ONE,
            )

    def _rotary_part(self, config: Config, table: _Table, place: Place) -> Problems:
        key = "partial_rotary_factor"
        for where, part in ((key, config.get(key)), (table.path(key), table.content.get(key))):
            if part is not None and not same(part, 1.0):
                yield error(
                    f"{place.config} has {where}={shown(part)}, {place.model} turns all channels of "
                    "a head",
                    "give weights of such a model",
                )

    def _lengths(
        self,
        config: Config,
        kind: RopeType,
        name: str,
        place: Place,
        sequence_lengths: Mapping[str, int],
    ) -> Problems:
        longest = config.get("max_position_embeddings", self.max_positions)
        if not isinstance(longest, int) or isinstance(longest, bool) or longest < 1:
            yield error(
                f"{place.config} has max_position_embeddings={shown(longest)}, which is no length",
                "give weights with a config.json that save_pretrained wrote",
            )
            return
        for stage, length in sequence_lengths.items():
            if length <= longest:
                continue
            text = (
                f"stages.{stage}.sequence_length={length} is longer than "
                f"{stated(config, 'max_position_embeddings', longest)} in {place.config}"
            )
            remedy = f"use a sequence_length of at most {longest}"
            if kind.is_bounded:
                yield error(f"{text}, where its rope_scaling ({name}) changes RoPE", remedy)
            else:
                yield warning(f"{text}: the weights have not seen such positions", remedy)


def _parameters(table: _Table, kind: RopeType, place: Place) -> Problems:
    content = table.content
    names = [content[key] for key in _TYPE_KEYS if key in content]
    if len(names) == 2 and not same(names[0], names[1]):
        both = " and ".join(f"{table.path(key)}={shown(content[key])}" for key in _TYPE_KEYS)
        yield error(f"{place.config} has {both}", _ONE)
    known = kind.parameters.keys() | {"rope_theta", "partial_rotary_factor", *_TYPE_KEYS}
    for key in sorted(content.keys() - known):
        yield error(
            f"{place.config} has {table.path(key)}={shown(content[key])}: RoPE of the type "
            f"{table.type} has no such parameter",
            f"give weights of another model, or remove {key} where it changes nothing",
        )
    for key in sorted(kind.parameters):
        value = content.get(key)
        if not _is_factor(value):
            yield error(
                f"{place.config} has {table.path(key)}={shown(value)}: RoPE of the type {table.type} "
                "needs a finite number there, and no huge one",
                "give weights with a config.json that save_pretrained wrote",
            )


def _scaling(table: _Table, kind: RopeType, language: LanguageConfig, place: Place) -> Problems:
    """The recipe's `rope_scaling` says something else than config.json."""
    ours, setting = language.rope_scaling, f"{place.group}.rope_scaling"
    if kind.scaling != (ours.kind if ours else None):
        wanted = {field: table.content.get(key) for key, field in kind.parameters.items() if field}
        stated_as = f"{{kind: {kind.scaling}" + "".join(
            f", {field}: {shown(value)}" for field, value in wanted.items()
        )
        yield error(
            f"{setting}{'.kind=' + ours.kind if ours else '=null'} but {place.config} has RoPE of the "
            f"type {shown(table.type)}: {table.name or 'rope_parameters'}={shown(table.content)}",
            f"set {setting}={stated_as}}}" if kind.scaling else f"set {setting}=null",
        )
        return
    for key, field in kind.parameters.items():
        if field and not same(table.content.get(key), getattr(ours, field)):
            yield error(
                f"{setting}.{field}={getattr(ours, field)} but {place.config} has "
                f"{table.path(key)}={shown(table.content.get(key))}",
                f"correct {place.group}, or give the weights that it describes",
            )


def _is_factor(value: Any) -> bool:
    """Whether `factor - (factor - 1)` is 1, by which dynamic scaling multiplies the base up to the limit."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not -1e15 < value < 1e15:
        return False
    return abs(value - (value - 1) - 1) < 1e-6
