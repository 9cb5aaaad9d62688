"""Qwen3 (dense): a norm over each head of queries and keys, heads of a size of their own, no biases."""

from __future__ import annotations

from dataclasses import replace

from nvlm_train.convert.families.decoder import (
    COMPUTED,
    IGNORED,
    TENSORS,
    UNUSED,
    left_out,
    sizes,
)
from nvlm_train.convert.family import Family
from nvlm_train.convert.keys import Always, Derived, Fixed, Sized, TokenId
from nvlm_train.convert.rope import PLAIN, STRETCHED, Rope
from nvlm_train.geometry import head_size

QWEN3 = Family(
    model_type="qwen3",
    # Defaults are those of transformers' Qwen3Config (5.23; 4.x has the same ones).
    keys=(
        Fixed("architectures", (["Qwen3ForCausalLM"], None), None),
        Sized("num_hidden_layers", "num_layers", 32),
        Sized("hidden_size", "hidden_size", 4096),
        Sized("num_attention_heads", "num_heads", 32),
        Sized("num_key_value_heads", "num_kv_heads", 32, null_means=("num_attention_heads", 32)),
        Sized("intermediate_size", "ffn_hidden_size", 22_016),
        # The only family whose absent key is a number: it does not follow from the other sizes.
        Sized("head_dim", "head_dim", 128, ours=head_size),
        *COMPUTED,
        # No layer has a window; its width and the layers that would have it are ignored, then.
        Fixed("use_sliding_window", (False,), False),
        Derived("layer_types", lambda language: (None, ["full_attention"] * language.num_layers)),
        # With attention_bias Qwen3 has biases on the output projection too.
        Fixed("attention_bias", (False,), False),
        Always("model_type", "qkv_bias", False),
        Always("model_type", "qk_norm", True),
        TokenId("pad_token_id", "vocab_size", 151_936),
    ),
    ignored=IGNORED | {"sliding_window", "max_window_layers"},
    tensors=TENSORS,
    sizes=sizes,
    # A recipe that says otherwise is told so by the key, not by every tensor.
    optional=lambda language: left_out(replace(language, qkv_bias=False, qk_norm=True)),
    harmless=UNUSED,
    padded="vocab",
    rows=151_936,
    rope=Rope({**PLAIN, **STRETCHED}, theta=10_000.0, max_positions=32_768),
)
