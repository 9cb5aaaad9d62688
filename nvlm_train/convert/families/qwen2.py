"""Qwen2 and Qwen2.5: biases on queries, keys and values, plain RoPE."""

from __future__ import annotations

from dataclasses import replace

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
from nvlm_train.convert.keys import Always, Derived, Fixed, Sized, TokenId
from nvlm_train.convert.rope import PLAIN, Rope

QWEN2 = Family(
    model_type="qwen2",
    # Defaults are those of transformers' Qwen2Config (5.23; 4.x has the same ones).
    keys=(
        Fixed("architectures", (["Qwen2ForCausalLM"], None), None),
        Sized("num_hidden_layers", "num_layers", 32),
        Sized("hidden_size", "hidden_size", 4096),
        Sized("num_attention_heads", "num_heads", 32),
        Sized("num_key_value_heads", "num_kv_heads", 32, null_means=("num_attention_heads", 32)),
        Sized("intermediate_size", "ffn_hidden_size", 22_016),
        *COMPUTED,
        # No layer has a window; its width and the layers that would have it are ignored, then.
        Fixed("use_sliding_window", (False,), False),
        # Published Qwen2.5 configs have it; positions of several axes are Qwen2-VL's.
        Fixed("use_mrope", (False,), False),
        Always("model_type", "qkv_bias", True),
        Always("model_type", "qk_norm", False),
        Derived("layer_types", lambda language: (None, ["full_attention"] * language.num_layers)),
        Derived("head_dim", head_dims, field="head_dim"),
        # A key of Llama's config that transformers' Qwen2 does not read, and NVLM-D's config.json has.
        # Qwen2 has biases on queries, keys and values and on nothing else.
        Derived("attention_bias", lambda language: (language.qkv_bias,)),
        TokenId("pad_token_id", "vocab_size", 151_936),
    ),
    ignored=IGNORED | {"sliding_window", "max_window_layers"},
    tensors=TENSORS,
    sizes=sizes,
    # A recipe that says otherwise is told so by the key, not by every tensor.
    optional=lambda language: left_out(replace(language, qk_norm=False)),
    harmless=UNUSED,
    padded="vocab",
    rows=151_936,
    rope=Rope(PLAIN, theta=10_000.0, max_positions=32_768),
)
