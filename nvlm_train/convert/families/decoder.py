"""What decoders of Llama's kind share: tensors by name and shape, and keys of config.json.

Every difference between them is a field of the recipe's `LanguageConfig`, so the tensors that a model
has follow from the recipe.
"""

from __future__ import annotations

from nvlm_train.config.model_schema import LanguageConfig
from nvlm_train.convert.ignored import BOOKKEEPING, GENERATION
from nvlm_train.convert.keys import Fixed, Rule, Sized
from nvlm_train.geometry import head_size, kv_size, query_size

_LAYER = "model.layers.{n}."
_ATTENTION = f"{_LAYER}self_attn."
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
TABLES = (EMBEDDING, OUTPUT)
"""Tables with a row for each id."""

TENSORS: dict[str, tuple[str | int, ...]] = {
    EMBEDDING: ("vocab", "hidden"),
    f"{_LAYER}input_layernorm.weight": ("hidden",),
    f"{_ATTENTION}q_proj.weight": ("queries", "hidden"),
    f"{_ATTENTION}k_proj.weight": ("keys", "hidden"),
    f"{_ATTENTION}v_proj.weight": ("keys", "hidden"),
    f"{_ATTENTION}q_proj.bias": ("queries",),
    f"{_ATTENTION}k_proj.bias": ("keys",),
    f"{_ATTENTION}v_proj.bias": ("keys",),
    f"{_ATTENTION}q_norm.weight": ("head",),
    f"{_ATTENTION}k_norm.weight": ("head",),
    f"{_ATTENTION}o_proj.weight": ("hidden", "queries"),
    f"{_LAYER}post_attention_layernorm.weight": ("hidden",),
    f"{_LAYER}mlp.gate_proj.weight": ("ffn", "hidden"),
    f"{_LAYER}mlp.up_proj.weight": ("ffn", "hidden"),
    f"{_LAYER}mlp.down_proj.weight": ("hidden", "ffn"),
    "model.norm.weight": ("hidden",),
    OUTPUT: ("vocab", "hidden"),
}
UNUSED = ("model.rotary_emb.inv_freq", f"{_ATTENTION}rotary_emb.inv_freq", OUTPUT)
"""Tensors that may be there where the model has none. The angles are computed again from rope_theta;
transformers before 4.32 stored them. Where tables are tied, the output layer's is the embedding's."""

COMPUTED: tuple[Rule, ...] = (
    Sized("rms_norm_eps", "norm_eps", 1e-6),
    Sized("tie_word_embeddings", "tied_embeddings", False),
    Fixed("hidden_act", ("silu", "swish"), "silu"),
    Fixed("mlp_bias", (False,), False),
    # nanotron's, in published SmolLM2s. transformers does not read it: weights whose channels turn in
    # neighbouring pairs would be read wrongly by both.
    Fixed("rope_interleaved", (False,), False),
    Fixed("quantization_config", (None,), None),
    Fixed("pruned_heads", ({}, None), None),
    Fixed("is_encoder_decoder", (False,), False),
    Fixed("add_cross_attention", (False,), False),
    # transformers then returns tuples without names: no model is saved like this.
    Fixed("return_dict", (True,), True),
)
"""Keys that mean the same in all of them. `mlp_bias` is Llama's, and NVLM-D's."""
IGNORED = BOOKKEEPING | GENERATION | {"vocab_size", "is_decoder", "pretraining_tp"}
"""Keys that change nothing. The recipe may pad the table, so the rows of the files are compared instead.
`pretraining_tp` (2 in first copies of Llama 2 13B) adds the same products up in slices; transformers 5
does not read it."""


def sizes(language: LanguageConfig) -> dict[str, int]:
    """Gives the names of dimensions in `TENSORS` their numbers."""
    return {
        "layers": language.num_layers,
        "hidden": language.hidden_size,
        "head": head_size(language),
        "queries": query_size(language),
        "keys": kv_size(language),
        "ffn": language.ffn_hidden_size,
        "vocab": language.vocab_size,
    }


def left_out(language: LanguageConfig) -> frozenset[str]:
    """Names those of `TENSORS` that the recipe's model does not have."""
    absent = set()
    if not language.qkv_bias:
        absent |= {f"{_ATTENTION}{name}_proj.bias" for name in "qkv"}
    if not language.qk_norm:
        absent |= {f"{_ATTENTION}{name}_norm.weight" for name in "qk"}
    if language.tied_embeddings:
        absent.add(OUTPUT)
    return frozenset(absent)


def head_dims(language: LanguageConfig) -> tuple[int]:
    """What `head_dim` may say."""
    return (head_size(language),)
