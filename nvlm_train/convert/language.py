"""The language models whose weights are read: the table of families, and a directory against the recipe.

A family is one file in `families/` and one row here. Its differences are fields of `LanguageConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nvlm_train.config.model_schema import LanguageConfig
from nvlm_train.convert.families.decoder import TABLES
from nvlm_train.convert.families.llama import LLAMA
from nvlm_train.convert.families.mistral import MISTRAL
from nvlm_train.convert.families.qwen2 import QWEN2
from nvlm_train.convert.families.qwen3 import QWEN3
from nvlm_train.convert.family import FLOATS, Family, family_of, key_problems, tensor_problems
from nvlm_train.convert.headers import Headers, read_headers
from nvlm_train.convert.keys import Config, Place, same, stated
from nvlm_train.convert.problem import Problem, Problems, error, warning
from nvlm_train.convert.whole.parts import open_part, own_tensors

FAMILIES: Mapping[str, Family] = {
    family.model_type: family for family in (QWEN2, QWEN3, LLAMA, MISTRAL)
}
"""By `model_type` of config.json."""


def language_problems(language: LanguageConfig, sequence_lengths: Mapping[str, int]) -> Problems:
    """What keeps `model.language.weights` from being what the recipe's language model computes.

    Args:
        language: with a directory as `weights`.
        sequence_lengths: stage to its sequence length in tokens; none where no stage is meant.
    """
    directory = Path(language.weights or "")
    place = _place(directory)
    part = open_part("language", directory, language, place)
    headers, config, place = part.headers, part.config, part.place
    yield from (*headers.problems, *part.problems)
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
    if family.lengths:
        yield from family.lengths(config, sequence_lengths, place)
    if headers.tensors:
        yield from tensor_problems(family, headers, config, language, place)
        yield from _table_problems(family, headers, config, language, place)


def _place(directory: Path) -> Place:
    return Place(
        setting=f"model.language.weights={directory}",
        group="model.language",
        config=str(directory / "config.json"),
        model="the language model of NVLM",
    )


def _table_problems(
    family: Family, headers: Headers, config: Config, language: LanguageConfig, place: Place
) -> Problems:
    """transformers does not load a table whose rows are not `vocab_size`; the recipe may pad it."""
    size = config.get("vocab_size", family.rows)
    yield from _padding_problems(size, language, place)
    for name in TABLES:
        stored = headers.tensors.get(name)
        if stored and stored.shape and not same(size, stored.shape[0]):
            yield error(
                f"{place.config} has {stated(config, 'vocab_size', size)}, but {name} has "
                f"{stored.shape[0]} rows",
                "give the config.json that belongs to these weights",
            )
    if language.tied_embeddings and not headers.problems:
        yield from _second_table(headers, place)


def _second_table(headers: Headers, place: Place) -> Problems:
    """A table of the output layer beside a tied one must be the same: Qwen3's repositories have it twice.

    transformers does not tie two that differ, whatever config.json says. Reads both, in pieces.
    """
    embedding, output = (headers.tensors.get(name) for name in TABLES)
    if embedding is None or output is None or embedding.shape != output.shape:
        return
    if not {embedding.dtype, output.dtype} <= FLOATS.keys() or not embedding.shape:
        return
    # Only weights with such a table need torch for their check.
    from nvlm_train.convert.weight_files import WeightFiles

    with WeightFiles(headers.tensors, place.setting) as files:
        for start in range(0, embedding.shape[0], _ROWS):
            rows = slice(start, min(start + _ROWS, embedding.shape[0]))
            first, second = (files.read(name, (rows,)) for name in TABLES)
            if not first.equal(second.to(first.dtype)):
                yield error(
                    f"{place.config} has tie_word_embeddings=true, but {TABLES[1]} is not "
                    f"{TABLES[0]}: they differ in rows {rows.start} to {rows.stop - 1}",
                    "set tie_word_embeddings to false in a copy of config.json, or leave the one table "
                    "that the model has",
                )
                return


_ROWS = 4096
"""Rows of a table that are compared at a time."""


def _padding_problems(size: Any, language: LanguageConfig, place: Place) -> Problems:
    """Rows that the weights do not have, and that the recipe does not call padding."""
    if type(size) is not int:
        return
    tokens = language.num_tokens
    if tokens is None and language.vocab_size > size:
        yield warning(
            f"model.language.vocab_size={language.vocab_size} with num_tokens=null, but {place.config} "
            f"has vocab_size={size}: rows of zeros take part in the softmax, and train",
            f"set model.language.num_tokens={size} in a run that is begun anew",
        )
    elif tokens is not None and size < min(tokens, language.vocab_size):
        yield error(
            f"model.language.num_tokens={tokens} but {place.config} has vocab_size={size}: rows of zeros "
            "would be predicted as tokens",
            f"set model.language.num_tokens={size}",
        )


def stored_rows(language: LanguageConfig) -> int | None:
    """Rows of the embedding table in `language.weights`; None where no such table can be read."""
    headers = read_headers(Path(language.weights or ""), "model.language.weights")
    table = own_tensors("language", headers).get(TABLES[0])
    return table.shape[0] if table and table.shape else None
