"""Mistral without a window: no biases, heads that may have a size of their own (Mistral NeMo)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from nvlm_train.convert.families.decoder import (
    COMPUTED,
    IGNORED,
    TENSORS,
    UNUSED,
    head_dims,
    left_out,
    sizes,
)
from nvlm_train.convert.family import Family
from nvlm_train.convert.keys import Always, Config, Derived, Fixed, Place, Sized, TokenId, stated
from nvlm_train.convert.problem import Problems, error
from nvlm_train.convert.rope import PLAIN, STRETCHED, Rope

_MAX_POSITIONS = 131_072
_WINDOW = 4096
"""transformers' default: a config.json without the key is one with a window (Mistral 7B v0.1)."""


@dataclass(frozen=True)
class Window:
    """A window that no position that the model was made for looks out of: the same as none."""

    key: str = "sliding_window"

    def problems(self, config: Config, group: Any, place: Place) -> Problems:
        """Tokens beyond the window would not be seen by the weights, and are by this code."""
        window, longest = config.get(self.key, _WINDOW), _longest(config)
        if window is not None and (type(window) is not int or window < longest):
            yield error(
                f"{place.config} has {stated(config, self.key, window)}, {place.model} sees all tokens: "
                f"it needs null, or at least max_position_embeddings={longest}",
                "give weights of a model without a window",
            )


def _longest(config: Config) -> Any:
    value = config.get("max_position_embeddings", _MAX_POSITIONS)
    return value if type(value) is int else _MAX_POSITIONS


def _within_window(config: Config, sequence_lengths: Mapping[str, int], place: Place) -> Problems:
    window = config.get(Window.key, _WINDOW)
    for stage, length in sequence_lengths.items():
        if type(window) is int and _longest(config) <= window < length:
            yield error(
                f"stages.{stage}.sequence_length={length} is longer than "
                f"{stated(config, Window.key, window)} in {place.config}, where the weights look no "
                "further",
                f"use a sequence_length of at most {window}",
            )


MISTRAL = Family(
    model_type="mistral",
    # Defaults are those of transformers' MistralConfig (5.23; 4.x has the same ones).
    keys=(
        Fixed("architectures", (["MistralForCausalLM"], None), None),
        Sized("num_hidden_layers", "num_layers", 32),
        Sized("hidden_size", "hidden_size", 4096),
        Sized("num_attention_heads", "num_heads", 32),
        Sized("num_key_value_heads", "num_kv_heads", 8, null_means=("num_attention_heads", 32)),
        Sized("intermediate_size", "ffn_hidden_size", 14_336),
        *COMPUTED,
        Window(),
        # A key of Llama's config that Mistral does not read, and has no biases.
        Fixed("attention_bias", (False,), False),
        Always("model_type", "qkv_bias", False),
        Always("model_type", "qk_norm", False),
        Derived("head_dim", lambda language: (None, *head_dims(language)), field="head_dim"),
        TokenId("pad_token_id", "vocab_size", 32_000),
    ),
    ignored=IGNORED,
    tensors=TENSORS,
    sizes=sizes,
    # A recipe that says otherwise is told so by the key, not by every tensor.
    optional=lambda language: left_out(replace(language, qkv_bias=False, qk_norm=False)),
    harmless=UNUSED,
    padded="vocab",
    rows=32_000,
    rope=Rope({**PLAIN, **STRETCHED}, theta=10_000.0, max_positions=_MAX_POSITIONS),
    lengths=_within_window,
)
