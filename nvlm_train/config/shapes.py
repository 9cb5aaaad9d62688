"""Rules on the sizes of the backbones: tiles into patches, widths into heads, channels into pairs."""

from __future__ import annotations

import math

from nvlm_train.config.model_schema import LanguageConfig, VisionConfig
from nvlm_train.config.ranges import Problems, above_zero, divisors, in_range, use

MOST_LAYERS, MOST_CHANNELS = 10_000, 2**31 - 1
"""No model comes near these: a config.json that says more is damaged, and its lists would never end."""


def vision_shapes_fit(vision: VisionConfig) -> Problems:
    """Patches cut a tile evenly, pixel shuffle finds pairs of them, heads cut the width evenly."""
    name = "model.vision"
    stated = () if vision.batch_tiles is None else ("batch_tiles",)
    yield from _sizes(name, vision, "patch_size", *stated)
    if min(vision.patch_size, vision.num_heads, vision.hidden_size) < 1:
        return
    if vision.tile_size < 1 or vision.tile_size % vision.patch_size:
        yield (
            f"{name}.patch_size={vision.patch_size} does not divide {name}.tile_size={vision.tile_size}; "
            f"use a multiple of {2 * vision.patch_size}, and weights of that size (SigLIP: 224/14, 384/16)"
        )
    elif vision.tile_size // vision.patch_size % 2:
        side = vision.tile_size // vision.patch_size
        yield (
            f"{name}.tile_size={vision.tile_size} makes {side} patches a side; pixel shuffle "
            f"joins 2 x 2: use a multiple of {2 * vision.patch_size}, and weights of that size"
        )
    if vision.hidden_size % vision.num_heads:
        yield _heads(name, vision.num_heads, vision.hidden_size)


def _sizes(name: str, group: VisionConfig | LanguageConfig, *others: str) -> Problems:
    yield from in_range(f"{name}.num_layers", group.num_layers, 1, MOST_LAYERS)
    for key in ("hidden_size", "num_heads", "ffn_hidden_size", *others):
        value = getattr(group, key)
        # Who wrote -1 has no use for a bound of two thousand millions.
        yield from in_range(f"{name}.{key}", value, 1, math.inf if value < 1 else MOST_CHANNELS)
    yield from above_zero(name, group, "norm_eps")


def _heads(name: str, heads: int, hidden: int) -> str:
    fitting = [value for value in divisors(hidden) if value <= heads]
    return (
        f"{name}.num_heads={heads} does not divide {name}.hidden_size={hidden}; {use(fitting[-4:])}"
    )


def language_shapes_fit(language: LanguageConfig) -> Problems:
    """Heads cut the width evenly, KV groups cut the heads evenly, RoPE finds pairs of channels."""
    name = "model.language"
    yield from _sizes(name, language, "num_kv_heads", "vocab_size")
    yield from _rope_turns(language)
    if language.num_tokens is not None:
        yield from in_range(f"{name}.num_tokens", language.num_tokens, 1, language.vocab_size)
    heads, groups, hidden = language.num_heads, language.num_kv_heads, language.hidden_size
    if min(heads, groups, hidden) < 1:
        return
    if language.head_dim is not None:
        yield from in_range(f"{name}.head_dim", language.head_dim, 2, MOST_CHANNELS)
        if language.head_dim % 2:
            yield f"{name}.head_dim={language.head_dim}; RoPE needs an even number of channels"
    elif hidden % heads:
        yield f"{_heads(name, heads, hidden)}, or state {name}.head_dim"
    elif hidden // heads % 2:
        yield f"{name}.num_heads={heads} makes heads of {hidden // heads} channels; RoPE needs an even number"
    if heads % groups:
        remedy = use(divisors(heads))
        yield f"{name}.num_kv_heads={groups} does not divide {name}.num_heads={heads}; {remedy}"


def _rope_turns(language: LanguageConfig) -> Problems:
    """The base is a number above 0; scaling slows channels down, from full to none between its two bounds."""
    scaling, name = language.rope_scaling, "model.language.rope_scaling"
    if language.rope_theta <= 0:
        yield f"model.language.rope_theta={language.rope_theta} is out of range; use more than 0"
    if scaling is None:
        return
    yield from in_range(f"{name}.factor", scaling.factor, 1.0)
    yield from in_range(f"{name}.original_max_positions", scaling.original_max_positions, 1)
    if not 0 < scaling.low_freq_factor < scaling.high_freq_factor:
        yield (
            f"{name}.low_freq_factor={scaling.low_freq_factor} and {name}.high_freq_factor="
            f"{scaling.high_freq_factor}; use a low one above 0 and a high one above that"
        )
