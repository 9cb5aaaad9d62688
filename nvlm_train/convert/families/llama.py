"""Llama 2 and 3, and what is one under another name (Yi, SmolLM2): no biases, RoPE that may be stretched."""

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
from nvlm_train.convert.rope import PLAIN, STRETCHED, Rope

LLAMA = Family(
    model_type="llama",
    # Defaults are those of transformers' LlamaConfig. Yi, of NVLM's 34B models, is a Llama.
    keys=(
        Fixed("architectures", (["LlamaForCausalLM"], None), None),
        Sized("num_hidden_layers", "num_layers", 32),
        Sized("hidden_size", "hidden_size", 4096),
        Sized("num_attention_heads", "num_heads", 32),
        Sized("num_key_value_heads", "num_kv_heads", None, null_means=("num_attention_heads", 32)),
        Sized("intermediate_size", "ffn_hidden_size", 11_008),
        *COMPUTED,
        # With attention_bias Llama has biases on queries, keys, values and on the output projection,
        # without it on none.
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
    rope=Rope({**PLAIN, **STRETCHED}, theta=10_000.0, max_positions=2048),
)
