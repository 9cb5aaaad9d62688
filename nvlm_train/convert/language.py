"""The language models whose weights are read: the table of families, and a directory against the recipe.

A family is one file in `families/` and one row here. Its differences are fields of `LanguageConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from nvlm_train.config.schema import LanguageConfig
from nvlm_train.convert.families.decoder import (
    COMPUTED,
    IGNORED,
    TABLES,
    TENSORS,
    UNUSED,
    head_dims,
    left_out,
    sizes,
)
from nvlm_train.convert.families.qwen2 import QWEN2
from nvlm_train.convert.family import Family, family_of, key_problems, read_config, tensor_problems
from nvlm_train.convert.headers import Headers, read_headers
from nvlm_train.convert.keys import (
    Always,
    Config,
    Derived,
    Fixed,
    Place,
    Sized,
    TokenId,
    same,
    stated,
)
from nvlm_train.convert.problem import Problem, Problems, error
from nvlm_train.convert.rope import PLAIN, Rope

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
        Derived("head_dim", lambda language: (None, *head_dims(language))),
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
