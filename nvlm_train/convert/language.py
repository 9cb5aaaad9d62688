"""The language models whose weights are read, as a table: one row a family."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nvlm_train.config.schema import LanguageConfig
from nvlm_train.convert.family import Family, family_of, key_problems, read_config, tensor_problems
from nvlm_train.convert.headers import Headers, read_headers
from nvlm_train.convert.ignored import BOOKKEEPING, GENERATION
from nvlm_train.convert.keys import (
    Always,
    Config,
    Derived,
    Fixed,
    Place,
    Rule,
    Sized,
    TokenId,
    same,
    stated,
)
from nvlm_train.convert.problem import Problem, Problems, error
from nvlm_train.convert.rope import PLAIN, Rope

_LAYER = "model.layers.{n}."
_BIASES = frozenset(f"{_LAYER}self_attn.{name}_proj.bias" for name in "qkv")
TABLES = ("model.embed_tokens.weight", "lm_head.weight")
"""Tables with a row for each id."""


def _sizes(language: LanguageConfig) -> dict[str, int]:
    head = language.hidden_size // language.num_heads
    return {
        "layers": language.num_layers,
        "hidden": language.hidden_size,
        "queries": language.num_heads * head,
        "keys": language.num_kv_heads * head,
        "ffn": language.ffn_hidden_size,
        "vocab": language.vocab_size,
    }


_COMPUTED: tuple[Rule, ...] = (
    Sized("rms_norm_eps", "norm_eps", 1e-6),
    Fixed("hidden_act", ("silu", "swish"), "silu"),
    # NVLM's language models have an output table of their own.
    Fixed("tie_word_embeddings", (False,), False),
    Fixed("mlp_bias", (False,), False),
    Fixed("pretraining_tp", (1,), 1),
    Fixed("quantization_config", (None,), None),
    Fixed("pruned_heads", ({}, None), None),
    Fixed("is_encoder_decoder", (False,), False),
    Fixed("add_cross_attention", (False,), False),
    # transformers then returns tuples without names: no model is saved like this.
    Fixed("return_dict", (True,), True),
)
"""What both families compute alike. `mlp_bias` and `pretraining_tp` are Llama's, and NVLM-D has them too."""
_IGNORED = BOOKKEEPING | GENERATION | {"vocab_size", "is_decoder"}
"""The recipe may pad the table, so the rows of the files are compared (`_table_problems`)."""
_TENSORS = {
    "model.embed_tokens.weight": ("vocab", "hidden"),
    f"{_LAYER}input_layernorm.weight": ("hidden",),
    f"{_LAYER}self_attn.q_proj.weight": ("queries", "hidden"),
    f"{_LAYER}self_attn.k_proj.weight": ("keys", "hidden"),
    f"{_LAYER}self_attn.v_proj.weight": ("keys", "hidden"),
    f"{_LAYER}self_attn.q_proj.bias": ("queries",),
    f"{_LAYER}self_attn.k_proj.bias": ("keys",),
    f"{_LAYER}self_attn.v_proj.bias": ("keys",),
    f"{_LAYER}self_attn.o_proj.weight": ("hidden", "queries"),
    f"{_LAYER}post_attention_layernorm.weight": ("hidden",),
    f"{_LAYER}mlp.gate_proj.weight": ("ffn", "hidden"),
    f"{_LAYER}mlp.up_proj.weight": ("ffn", "hidden"),
    f"{_LAYER}mlp.down_proj.weight": ("hidden", "ffn"),
    "model.norm.weight": ("hidden",),
    "lm_head.weight": ("vocab", "hidden"),
}
_ANGLES = ("model.rotary_emb.inv_freq", f"{_LAYER}self_attn.rotary_emb.inv_freq")
"""They are computed again from rope_theta; transformers before 4.32 stored them."""


def _head(language: LanguageConfig) -> tuple[int]:
    return (language.hidden_size // language.num_heads,)


def _biases_left_out(language: LanguageConfig) -> frozenset[str]:
    return frozenset() if language.qkv_bias else _BIASES


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
        *_COMPUTED,
        # No layer has a window; its width and the layers that would have it are ignored, then.
        Fixed("use_sliding_window", (False,), False),
        # Published Qwen2.5 configs have it; positions of several axes are Qwen2-VL's.
        Fixed("use_mrope", (False,), False),
        Derived("layer_types", lambda language: (None, ["full_attention"] * language.num_layers)),
        Derived("head_dim", _head),
        # A key of Llama's config that transformers' Qwen2 does not read, and NVLM-D's config.json has.
        # Qwen2 has biases on queries, keys and values and on nothing else.
        Derived("attention_bias", lambda language: (language.qkv_bias,)),
        TokenId("pad_token_id", "vocab_size", 151_936),
    ),
    ignored=_IGNORED | {"sliding_window", "max_window_layers"},
    tensors=_TENSORS,
    sizes=_sizes,
    optional=_biases_left_out,
    harmless=_ANGLES,
    padded="vocab",
    rows=151_936,
    rope=Rope(PLAIN, theta=10_000.0, max_positions=32_768),
)

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
        *_COMPUTED,
        # With attention_bias Llama has biases on queries, keys, values and on the output projection,
        # without it on none.
        Fixed("attention_bias", (False,), False),
        Always("model_type", "qkv_bias", False),
        Derived("head_dim", lambda language: (None, *_head(language))),
        TokenId("pad_token_id", "vocab_size", 32_000),
    ),
    ignored=_IGNORED,
    tensors=_TENSORS,
    sizes=_sizes,
    optional=lambda language: _BIASES,
    harmless=_ANGLES,
    padded="vocab",
    rows=32_000,
    rope=Rope(PLAIN, theta=10_000.0, max_positions=2048),
)

FAMILIES: Mapping[str, Family] = {family.model_type: family for family in (QWEN2, LLAMA)}
"""By `model_type` of config.json."""


def language_problems(language: LanguageConfig, sequence_lengths: Mapping[str, int]) -> Problems:
    """What keeps `model.language.weights` from being what the recipe's language model computes.

    Args:
        language: with a directory as `weights`.
        sequence_lengths: stage to its sequence length in tokens; none where no stage is meant.
    """
    directory = Path(language.weights or "")
    place = _place(directory)
    headers = read_headers(directory, place.setting)
    yield from headers.problems
    config = read_config(directory / "config.json", place.setting)
    if isinstance(config, Problem):
        yield config
        return
    family = family_of(FAMILIES, config, place)
    if isinstance(family, Problem):
        yield family
        return
    yield from key_problems(family, config, language, place)
    if family.rope:
        yield from family.rope.problems(config, language, place, sequence_lengths)
    if headers.tensors:
        yield from tensor_problems(family, headers, config, language, place)
        yield from _table_problems(family, headers, config, place)


def _place(directory: Path) -> Place:
    return Place(
        setting=f"model.language.weights={directory}",
        group="model.language",
        config=str(directory / "config.json"),
        model="the language model of NVLM",
    )


def _table_problems(family: Family, headers: Headers, config: Config, place: Place) -> Problems:
    """transformers does not load a table whose rows are not `vocab_size`."""
    size = config.get("vocab_size", family.rows)
    for name in TABLES:
        stored = headers.tensors.get(name)
        if stored and stored.shape and not same(size, stored.shape[0]):
            yield error(
                f"{place.config} has {stated(config, 'vocab_size', size)}, but {name} has "
                f"{stored.shape[0]} rows",
                "give the config.json that belongs to these weights",
            )


def stored_rows(language: LanguageConfig) -> int | None:
    """Rows of the embedding table in `language.weights`; None where no such table can be read."""
    headers = read_headers(Path(language.weights or ""), "model.language.weights")
    table = headers.tensors.get(TABLES[0])
    return table.shape[0] if table and table.shape else None
