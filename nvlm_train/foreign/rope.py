"""Rotary position parameters, as transformers 4 (`rope_theta`, `rope_scaling`) and 5 write them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nvlm_train.config.model_schema import LanguageConfig
from nvlm_train.foreign.keys import Config, Place, same, shown, stated
from nvlm_train.foreign.problem import Problems, error, warning

_TYPE_KEYS = ("rope_type", "type")
"""The second is how transformers named it at first; the first one wins."""


@dataclass(frozen=True)
class RopeType:
    """A kind of scaling that does not change RoPE, at least not up to `max_position_embeddings`."""

    parameters: frozenset[str]
    """Numbers that it needs."""
    is_bounded: bool
    """Whether it changes RoPE beyond that length."""


PLAIN = {
    "default": RopeType(frozenset(), is_bounded=False),
    # base * (factor * S / max - (factor - 1)) ** ..., S = max(longest, max): base itself up to max
    # (transformers, modeling_rope_utils._compute_dynamic_ntk_parameters). NVLM-D 72B has it.
    "dynamic": RopeType(frozenset({"factor"}), is_bounded=True),
}
"""What megatron-core's plain rotary embedding computes."""


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

    def problems(
        self,
        config: Config,
        language: LanguageConfig,
        place: Place,
        sequence_lengths: Mapping[str, int],
    ) -> Problems:
        """What is not plain RoPE with the recipe's base.

        Args:
            config: the config.json.
            language: the recipe's group.
            place: how messages name things.
            sequence_lengths: stage to its sequence length in tokens.
        """
        scaling, parameters = config.get("rope_scaling"), config.get("rope_parameters")
        for key, value in (("rope_scaling", scaling), ("rope_parameters", parameters)):
            if value is not None and not isinstance(value, dict):
                yield error(
                    f"{place.config} has {key}={shown(value)}, which is no table of parameters",
                    "give weights with a config.json that save_pretrained wrote",
                )
                return
        if scaling and parameters and scaling != parameters:
            yield error(
                f"{place.config} has rope_scaling={shown(scaling)} and rope_parameters="
                f"{shown(parameters)}, of which transformers 5 reads the first and 4 both",
                "leave the one that the weights were trained with",
            )
        chosen = scaling or parameters or {}
        yield from self._theta(config, chosen, language, place)
        yield from self._rotary_part(config, chosen, place)
        yield from self._type(config, chosen, place, sequence_lengths)

    def _theta(
        self, config: Config, chosen: Config, language: LanguageConfig, place: Place
    ) -> Problems:
        found = [table["rope_theta"] for table in (chosen, config) if "rope_theta" in table]
        theta = found[0] if found else self.theta
        holder = chosen if "rope_theta" in chosen else config
        if not same(theta, language.rope_theta):
            yield error(
                f"{place.group}.rope_theta={language.rope_theta} but {place.config} has "
                f"{stated(holder, 'rope_theta', theta)}",
                f"correct {place.group}, or give the weights that it describes",
            )
        if len(found) == 2 and not same(found[0], found[1]):
            yield error(
                f"{place.config} has rope_theta={shown(found[1])} and inside its RoPE parameters "
                f"rope_theta={shown(found[0])}",
                "leave the one that the weights were trained with",
            )

    def _rotary_part(self, config: Config, chosen: Config, place: Place) -> Problems:
        for table in (chosen, config):
            part = table.get("partial_rotary_factor")
            if part is not None and not same(part, 1.0):
                yield error(
                    f"{place.config} has partial_rotary_factor={shown(part)}, {place.model} turns "
                    "all channels of a head",
                    "give weights of such a model",
                )

    def _type(
        self, config: Config, chosen: Config, place: Place, sequence_lengths: Mapping[str, int]
    ) -> Problems:
        names = [chosen[key] for key in _TYPE_KEYS if key in chosen] or ["default"]
        if len(names) == 2 and not same(names[0], names[1]):
            yield error(
                f"{place.config} has rope_type={shown(names[0])} and type={shown(names[1])}",
                "leave the one that the weights were trained with",
            )
        kind = self.types.get(names[0]) if isinstance(names[0], str) else None
        if kind is None:
            yield error(
                f"{place.config} has RoPE of the type rope_type={shown(names[0])} "
                f"({shown(dict(chosen))}), {place.model} needs {' or '.join(self.types)}",
                "give weights of such a model",
            )
            return
        yield from _parameters(chosen, kind, names[0], place)
        yield from self._lengths(config, kind, names[0], place, sequence_lengths)

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


def _parameters(chosen: Config, kind: RopeType, name: str, place: Place) -> Problems:
    known = kind.parameters | {"rope_theta", "partial_rotary_factor", *_TYPE_KEYS}
    for key in sorted(chosen.keys() - known):
        yield error(
            f"{place.config} has {key}={shown(chosen[key])} among the parameters of RoPE of the "
            f"type {name}, which has no such parameter",
            f"give weights of another model, or remove {key} where it changes nothing",
        )
    for key in sorted(kind.parameters):
        if not _is_number(chosen.get(key)):
            yield error(
                f"{place.config} has no number as {key} of RoPE of the type {name}",
                "give weights with a config.json that save_pretrained wrote",
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
