"""The vocabulary's padding: which size a layout needs, and what the tokenizer may use of it."""

from __future__ import annotations

import pytest

from nvlm_train.convert.tokenizer import tokenizer_problems
from nvlm_train.errors import ConfigError
from nvlm_train.recipe.load import load_recipe

VOCABULARY = "model.language.vocab_size=643"
TP2 = ["parallel@stages.pretrain.parallel=tp2", "stages.sft.parallel.tensor=2"]


def test_a_vocabulary_that_tp_does_not_divide_is_told_its_padded_size() -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(["experiment=smoke", VOCABULARY, *TP2])
    problems = caught.value.problems
    assert problems == (
        "stages.pretrain.parallel.tensor=2 does not divide model.language.vocab_size=643; "
        "use 704, with model.language.num_tokens=643",
        "stages.sft.parallel.tensor=2 does not divide model.language.vocab_size=643; "
        "use 704, with model.language.num_tokens=643",
    )
    remedy = ["model.language.vocab_size=704", "model.language.num_tokens=643"]
    assert load_recipe(["experiment=smoke", *remedy, *TP2]).model.language.num_tokens == 643


def test_one_padded_size_fits_all_stages() -> None:
    """A TP of 3 in one stage and 2 in the other: 64 x 3 rows at a time."""
    sizes = {"num_heads": 6, "num_kv_heads": 6, "head_dim": 8, "ffn_hidden_size": 96}
    own = [f"model.language.{name}={size}" for name, size in sizes.items()]
    own += ["model.projector.ffn_hidden_size=96", "stages.sft.parallel.tensor=3"]
    own += ["stages.pretrain.parallel.tensor=2"]
    with pytest.raises(ConfigError) as caught:
        load_recipe(["experiment=smoke", VOCABULARY, *own])
    assert all("use 768, with" in each for each in caught.value.problems)
    load_recipe(["experiment=smoke", "model.language.vocab_size=768", *own])


def test_heads_that_tp_does_not_divide_name_the_sizes_that_do() -> None:
    """SmolLM2-135M's: nine heads, three groups; the vocabulary takes no part, because it can be padded."""
    sizes = {
        "hidden_size": 576, "num_heads": 9, "num_kv_heads": 3, "ffn_hidden_size": 1536, "vocab_size": 49152,
    }  # fmt: skip
    own = [f"model.language.{name}={size}" for name, size in sizes.items()]
    own += ["model.projector.ffn_hidden_size=1536", "stages.sft.parallel.tensor=2"]
    with pytest.raises(ConfigError) as caught:
        load_recipe(["experiment=smoke", *own])
    assert caught.value.problems == (
        "stages.sft.parallel.tensor=2 does not divide model.language.num_heads=9; use 1 or 3",
        "stages.sft.parallel.tensor=2 does not divide model.language.num_kv_heads=3; use 1 or 3",
    )


def test_padding_is_inside_the_table() -> None:
    with pytest.raises(ConfigError, match=r"num_tokens=641 is out of range; use from 1 to 640"):
        load_recipe(["experiment=smoke", "model.language.num_tokens=641"])


def test_tokens_in_the_padding_are_refused() -> None:
    recipe = load_recipe(["experiment=smoke", "model.language.num_tokens=600"])
    (problem,) = tokenizer_problems(recipe)
    assert "model.language.num_tokens=600: ids from 600 on have only padding" in problem.text
    assert "raise model.language.num_tokens to at least 640" in problem.remedy
