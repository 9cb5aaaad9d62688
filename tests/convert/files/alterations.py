"""Plausible other values of a key in a config.json, and keys of other models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Change = dict[str, Any]
"""A whole config.json with one key altered, added or removed."""

WORDS = {
    "hidden_act": ["gelu", "relu", "gelu_pytorch_tanh", "swish"],
    "norm_type": ["layer_norm", "rms_norm"],
    "dtype": ["float8_e4m3fn"],
    "torch_dtype": ["int8"],
    "architectures": [["Qwen3ForCausalLM"], ["LlamaForCausalLM"]],
    "model_type": ["llama", "qwen3", "mistral", "gemma"],
    "layer_types": [["sliding_attention", "full_attention"], ["full_attention"], None],
    "image_size": [16, [32, 16], [64, 64], 32],
    "patch_size": [8, [8, 8], [4, 8], 4],
    "num_key_value_heads": [4, 1, None],
    "attn_implementation": ["eager"],
    "problem_type": ["regression"],
    "pruned_heads": [{"0": [1]}],
}
"""By key, where the kind of value does not say enough."""

ROPE: list[Change] = [
    {"rope_type": "linear", "factor": 2.0},
    {"type": "linear", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    {
        "rope_type": "longrope", "factor": 2.0, "original_max_position_embeddings": 16,
        "short_factor": [1.5] * 4, "long_factor": [2.0] * 4,
    },
    {"rope_type": "dynamic", "factor": 3.0, "partial_rotary_factor": 0.5},
    {"rope_type": "dynamic"},
    {"type": "dynamic", "factor": float("inf")},
    {"type": "dynamic", "factor": float("nan")},
    {"type": "dynamic", "factor": 1e17},
    {"rope_type": "proportional", "partial_rotary_factor": 0.5},
    {"rope_type": "default", "rope_theta": 500.0},
    {"type": "dynamic", "factor": 3.0, "rope_theta": 500.0},
    {"full_attention": {"rope_type": "default", "rope_theta": 10.0}},
]  # fmt: skip


def alterations(config: Change, added: Change) -> Iterator[tuple[str, Change]]:
    """Each key of the config removed and altered, and each other key of `added` added, in turn.

    Yields:
        The key, and the whole changed config.
    """
    for key in config:
        yield key, {name: value for name, value in config.items() if name != key}
        for value in values(key, config[key]):
            yield key, config | {key: value}
    for key, value in added.items():
        if key not in config:
            for each in [value, *values(key, value)]:
                yield key, config | {key: each}


def values(key: str, value: Any) -> list[Any]:
    """Other values of the kind."""
    if key in WORDS:
        return [each for each in WORDS[key] if each != value]
    if key in ("rope_scaling", "rope_parameters"):
        theta = {"rope_theta": value["rope_theta"]} if "rope_theta" in (value or {}) else {}
        inside = [
            (value or {}) | {name: each}
            for name, old in (value or {}).items()
            for each in values(name, old)
        ]
        return [theta | each for each in ROPE] + inside
    return _other(value)


def _other(value: Any) -> list[Any]:
    """By type alone."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value * 2, value // 2]
    if isinstance(value, float):
        return [value * 10 + 0.1, value / 10]
    return [1] if value is None else []
