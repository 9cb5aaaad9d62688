"""The tokenizer against the table and the weights: rules that doctor shows and training enforces."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nvlm_train.config.model_schema import TokenizerConfig
from nvlm_train.config.paths import PACKAGE, recipes_dir
from nvlm_train.convert import check
from nvlm_train.convert.tokenizer import vocabulary_of
from nvlm_train.doctor.material import check_tokenizer
from nvlm_train.recipe.load import load_recipe
from nvlm_train.tokens import Tokenizer
from tests.convert.files import starts
from tests.workers import WorkerPool

LANGUAGE_MODEL = PACKAGE / "demo/assets/language_model"
NUM_IDS = 640
Change = Callable[[dict[str, Any]], object]


def changed_tokenizer(directory: Path, change: Change) -> Path:
    """The demo's tokenizer.json, changed."""
    content = json.loads((LANGUAGE_MODEL / "tokenizer.json").read_text())
    change(content)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "tokenizer.json"
    path.write_text(json.dumps(content))
    return path


def token(content: str, number: int, special: bool = True) -> dict[str, Any]:
    """An entry of added_tokens."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, "special": special, **flags}


def found(level: str, *overrides: str) -> str:
    """What doctor shows."""
    recipe = load_recipe(overrides)
    assert [each.text for each in check.tokenizer(recipe)] == [
        each.text for each in check_tokenizer(recipe) if each.level != "ok"
    ]
    return "\n".join(each.text for each in check_tokenizer(recipe) if each.level == level)


def experiment(name: str, tokenizer: Path, *more: str) -> list[str]:
    return [f"experiment={name}", f"model.tokenizer.path={tokenizer}", *more]


@pytest.mark.parametrize(
    "path", sorted((recipes_dir() / "model").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_shipped_model_holds_its_tokenizer_s_ids(path: Path) -> None:
    bare = path.stem in ("nvlm_d", "nvlm_x", "nvlm_h")
    parts = ["language=demo", "vision=demo"] if bare else []
    parts += ["model.cross_attention.every=1"] if bare and path.stem != "nvlm_d" else []
    recipe = load_recipe(["experiment=smoke", f"model={path.stem}", *parts])
    assert list(check.tokenizer(recipe)) == []
    assert Tokenizer(recipe.model.tokenizer).vocab_size == NUM_IDS


@pytest.mark.slow
def test_ids_beyond_the_table_end_training_in_every_layout(
    workers: WorkerPool, tmp_path: Path
) -> None:
    recipes = [
        ["experiment=smoke", f"run_dir={tmp_path}", "model.language.vocab_size=512"]
        + [f"parallel@stages.{stage}.parallel={layout}" for stage in ("pretrain", "sft")]
        for layout in ("single", "tp2", "tp2_sp", "pp2")
    ]
    for messages in workers.run(2, starts.refusals, *recipes):
        for said in messages:
            assert "the tokenizer has 640 ids, model.language.vocab_size=512" in said
            assert "raise model.language.vocab_size to at least 640" in said
    assert "the tokenizer has 640 ids" in found("error", *recipes[0])


def test_ids_with_gaps_need_rows_up_to_the_largest(tmp_path: Path) -> None:
    """The number of tokens says nothing: one token with id 700 needs 701 rows."""
    path = changed_tokenizer(tmp_path, lambda all_: all_["model"]["vocab"].update({"zzzzzz": 700}))
    assert Tokenizer(TokenizerConfig(path=str(path))).vocab_size == 701
    assert "has 701 ids" in found("error", *experiment("smoke", path))
    assert found("error", *experiment("smoke", path, "model.language.vocab_size=701")) == ""


def test_an_added_token_needs_a_row(tmp_path: Path) -> None:
    added = token("<|mine|>", NUM_IDS)
    path = changed_tokenizer(tmp_path, lambda all_: all_["added_tokens"].append(added))
    assert "has 641 ids, model.language.vocab_size=640" in found(
        "error", *experiment("smoke", path)
    )


@pytest.mark.slow
def test_control_tokens_and_tags_are_rules_of_training(workers: WorkerPool, tmp_path: Path) -> None:
    def forgeable(content: dict[str, Any]) -> None:
        for each in content["added_tokens"]:
            each["special"] = False
        content["normalizer"] = {"type": "Lowercase"}

    def swapped(content: dict[str, Any]) -> None:
        vocabulary = content["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]

    smoke, own = ["experiment=smoke", f"run_dir={tmp_path}/run"], [f"run_dir={tmp_path}/run"]
    lowercase = changed_tokenizer(tmp_path / "lowercase", forgeable)
    other = changed_tokenizer(tmp_path / "other", swapped)
    one_rank = [f"parallel@stages.{stage}.parallel=single" for stage in ("pretrain", "sft")]
    recipes = {
        "pad and model.tokenizer.turn_end share an id": [*smoke, "model.tokenizer.pad='<|im_end|>'"],
        "turn_start and model.tokenizer.turn_end share": [
            *smoke, "model.tokenizer.turn_start='<|im_end|>'"
        ],
        "turn_end=<none> is not in the vocabulary": [*smoke, "model.tokenizer.turn_end='<none>'"],
        "'<|im_end|>' inside a sample becomes the control token": experiment("smoke", lowercase, *own),
        "stage pretrain: '<Image>' comes back as '<image>'": experiment("smoke", lowercase, *own),
        # Of the weights that the demo starts from.
        "2 tokens have other ids than in": experiment("demo", other, *own, *one_rank),
    }  # fmt: skip
    (messages,) = workers.run(1, starts.refusals, *recipes.values())
    for (message, arguments), said in zip(recipes.items(), messages, strict=True):
        assert message in said
        assert message in found("error", *arguments)


def test_every_tag_of_every_grid_is_tried(tmp_path: Path) -> None:
    """Of tags with rows a grid of one row has none but the first."""
    lost = {"type": "Replace", "pattern": {"String": "_y2"}, "content": ""}
    path = changed_tokenizer(tmp_path, lambda content: content.update(normalizer=lost))
    arguments = experiment("smoke", path, "stages.sft.tiling.tags=2d_grid")
    assert "'<tile_x0_y2>' comes back as '<tile_x0>'" in found("error", *arguments)


def test_a_tokenizer_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text('{"model": 3}')
    assert f"model.tokenizer.path={path} cannot be read" in found(
        "error", *experiment("smoke", path)
    )


# ---- against the weights that training starts from ----


def test_a_row_of_zeros_is_no_token(tmp_path: Path) -> None:
    """The recipe may pad the table; what the padding holds has never been trained."""
    added = token("<|mine|>", NUM_IDS)
    path = changed_tokenizer(tmp_path, lambda all_: all_["added_tokens"].append(added))
    arguments = experiment("demo", path, "model.language.vocab_size=704")
    assert "1 tokens such as '<|mine|>' have ids from 640 on" in found("error", *arguments)
    assert found("error", "experiment=demo", "model.language.vocab_size=704") == ""
    # As resize_token_embeddings of transformers would leave them.
    taller = shutil.copytree(LANGUAGE_MODEL, tmp_path / "taller")
    state = load_file(taller / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.cat([state[name], torch.randn(64, state[name].shape[1])])
    save_file(state, taller / "model.safetensors")
    config = json.loads((taller / "config.json").read_text())
    (taller / "config.json").write_text(json.dumps(config | {"vocab_size": 704}))
    assert found("error", *arguments, f"model.language.weights={taller}") == ""


def test_a_control_token_that_the_weights_do_not_know_is_a_warning(tmp_path: Path) -> None:
    """Some models keep ids for tokens to come, and SFT may teach a base model to take turns."""
    own = shutil.copytree(LANGUAGE_MODEL, tmp_path / "own")

    def rename(content: dict[str, Any]) -> None:
        vocabulary = content["model"]["vocab"]
        for each in content["added_tokens"]:
            if each["content"] == "<|im_start|>":
                each["content"] = "<|reserved_0|>"
                vocabulary["<|reserved_0|>"] = each["id"]
        vocabulary.pop("<|im_start|>", None)

    changed_tokenizer(own, rename)
    arguments = ["experiment=demo", f"model.language.weights={own}"]
    assert found("error", *arguments) == ""
    warned = found("warning", *arguments)
    assert (
        "does not know the control token <|im_start|>" in warned
        and "'<|reserved_0|>' there" in warned
    )


def test_a_larger_vocabulary_with_the_same_ids_is_accepted(tmp_path: Path) -> None:
    """NVLM-D 72B has Qwen2's weights and Qwen2.5's tokenizer, which has more tokens."""
    own = shutil.copytree(LANGUAGE_MODEL, tmp_path / "own")
    last = max(vocabulary_of(LANGUAGE_MODEL / "tokenizer.json").items(), key=lambda pair: pair[1])[
        0
    ]

    def drop(content: dict[str, Any]) -> None:
        del content["model"]["vocab"][last]
        content["model"]["merges"].pop()

    changed_tokenizer(own, drop)
    arguments = ["experiment=demo", f"model.language.weights={own}"]
    assert found("error", *arguments) == found("warning", *arguments) == ""


def test_vocabularies_of_other_kinds(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(
        json.dumps({"model": {"vocab": [["a", -1.0], ["b", -2.0]]}, "added_tokens": None})
    )
    assert vocabulary_of(path) == {"a": 0, "b": 1}
    for text in ("{", "[]", '{"model": {}}', '{"model": {"vocab": 3}}'):
        path.write_text(text)
        assert vocabulary_of(path) is None
