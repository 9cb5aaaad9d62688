"""Each key of a language model's config.json in turn: whatever changes transformers' logits is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nvlm_train.convert.language import language_problems
from tests.convert.files.alterations import alterations
from tests.convert.files.conftest import Write
from tests.convert.files.models import LANGUAGE, logits

LENGTHS = {"sft": 24}
"""Tokens of the sequence whose logits are compared."""


def errors(directory: Path, **changes: Any) -> list[str]:
    """What the check refuses."""
    language = replace(LANGUAGE, weights=str(directory), **changes)
    problems = list(language_problems(language, LENGTHS))
    return [str(problem) for problem in problems if problem.level == "error"]


def changes_logits(directory: Path, expected: torch.Tensor) -> bool:
    """Whether transformers computes something else, or does not load it."""
    try:
        found = logits(directory)
    # Whatever it is: what transformers does not load, we must not read either.
    except Exception:
        return True
    return found.shape != expected.shape or not torch.allclose(found, expected, atol=1e-5)


def stored_by_5(config: dict[str, Any]) -> dict[str, Any]:
    """As save_pretrained of transformers 5 writes it."""
    return config


def stored_by_4(config: dict[str, Any]) -> dict[str, Any]:
    """As transformers 4 wrote Qwen2's: RoPE and dtype at the top, no layer_types."""
    old = {
        key: config[key] for key in config if key not in ("rope_parameters", "layer_types", "dtype")
    }
    return old | {
        "rope_theta": config["rope_parameters"]["rope_theta"],
        "rope_scaling": None,
        "torch_dtype": "float32",
        "sliding_window": 4096,
        "_attn_implementation_autoset": True,
        "transformers_version": "4.46.0",
    }


def stored_like_nvlm_d(config: dict[str, Any]) -> dict[str, Any]:
    """With the keys and the quirk of NVLM-D 72B's language model."""
    own = {"type": "dynamic", "factor": 3.0}
    return stored_by_4(config) | {
        "rope_scaling": own, "attention_bias": True, "mlp_bias": False, "pretraining_tp": 1
    }  # fmt: skip


STYLES = (stored_by_5, stored_by_4, stored_like_nvlm_d)


def keys_of_other_models() -> dict[str, Any]:
    """Whatever else a config.json of a language model may have, with a value that such a model has."""
    from transformers import (
        Gemma2Config,
        GPTNeoXConfig,
        LlamaConfig,
        MistralConfig,
        Phi3Config,
        Qwen2Config,
        Qwen2MoeConfig,
        Qwen3Config,
    )

    kinds = (
        Qwen2Config, LlamaConfig, MistralConfig, Qwen3Config, Gemma2Config, Phi3Config, GPTNeoXConfig,
        Qwen2MoeConfig,
    )  # fmt: skip
    found: dict[str, Any] = {}
    for kind in kinds:
        found |= {key: value for key, value in kind().to_dict().items() if key not in found}
    return found | {
        "is_causal": False,
        "head_dim": 8,
        "rope_theta": 10_000.0,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "partial_rotary_factor": 0.5,
        "attention_chunk_size": 4,
        "per_layer_config": {"0": {"rms_norm_eps": 0.5}},
        "quantization_config": {"quant_method": "fp8"},
        "use_bidirectional_attention": True,
        "auto_map": {"AutoModelForCausalLM": "modeling.Other"},
        "no_such_key": 3,
    }


@pytest.mark.parametrize("style", STYLES)
def test_the_config_as_it_was_written_is_accepted(
    qwen2: Write, qwen2_files: Path, style: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    directory = qwen2(style(json.loads((qwen2_files / "config.json").read_text())))
    assert errors(directory) == []
    assert torch.allclose(logits(directory), logits(qwen2_files), atol=1e-5)


def passed_over(
    original: dict[str, Any], write: Write, expected: torch.Tensor, **changes: Any
) -> list[tuple[str, Any]]:
    """Alterations that change transformers' logits, and that the check does not name."""
    found, counted = [], 0
    for key, config in alterations(original, keys_of_other_models()):
        directory = write(config)
        named = any(key in each for each in errors(directory, **changes))
        if not named and changes_logits(directory, expected):
            found.append((key, config.get(key, "removed")))
        counted += named
    assert counted > 60, "a check of nothing would pass"
    return found


@pytest.mark.parametrize("style", STYLES)
def test_every_key_that_changes_logits_is_named(
    qwen2: Write, qwen2_files: Path, style: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    original = style(json.loads((qwen2_files / "config.json").read_text()))
    assert passed_over(original, qwen2, logits(qwen2_files)) == []


@pytest.mark.parametrize("style", [stored_by_5, pytest.param(stored_by_4, marks=pytest.mark.slow)])
def test_every_key_of_llama_that_changes_logits_is_named(
    llama: Write, llama_files: Path, style: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    original = style(json.loads((llama_files / "config.json").read_text()))
    if style is stored_by_4:
        del original["sliding_window"]  # no key of Llama's
    assert errors(llama(original), qkv_bias=False) == []
    assert passed_over(original, llama, logits(llama_files), qkv_bias=False) == []


QWEN3 = {"qkv_bias": False, "qk_norm": True, "head_dim": 12}


@pytest.mark.parametrize("style", [stored_by_5, stored_by_4])
def test_every_key_of_qwen3_that_changes_logits_is_named(
    qwen3: Write, qwen3_files: Path, style: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    original = style(json.loads((qwen3_files / "config.json").read_text()))
    assert errors(qwen3(original), **QWEN3) == []
    assert passed_over(original, qwen3, logits(qwen3_files), **QWEN3) == []


@pytest.mark.parametrize("style", [stored_by_5, stored_by_4])
def test_every_key_of_mistral_that_changes_logits_is_named(
    mistral: Write, mistral_files: Path, style: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    original = style(json.loads((mistral_files / "config.json").read_text()))
    assert errors(mistral(original), qkv_bias=False) == []
    assert passed_over(original, mistral, logits(mistral_files), qkv_bias=False) == []


def test_an_absent_head_size_of_qwen3_is_128(qwen3: Write, qwen3_files: Path) -> None:
    original = json.loads((qwen3_files / "config.json").read_text())
    del original["head_dim"]
    message = "\n".join(errors(qwen3(original), **QWEN3))
    assert "head_dim=12 but" in message and "no head_dim, which means head_dim=128" in message


def test_a_window_that_nothing_looks_out_of_is_none(mistral: Write, mistral_files: Path) -> None:
    """A shorter one is another model, and a sequence that is longer than the window looks out of it."""
    original = json.loads((mistral_files / "config.json").read_text())
    expected = logits(mistral_files)
    for window in (64, 4096):
        directory = mistral(original | {"sliding_window": window})
        assert errors(directory, qkv_bias=False) == []
        assert not changes_logits(directory, expected)
    (problem,) = errors(mistral(original | {"sliding_window": 63}), qkv_bias=False)
    assert "sliding_window=63" in problem and "max_position_embeddings=64" in problem
    del original["sliding_window"]
    original["max_position_embeddings"] = 8192
    (problem,) = errors(mistral(original), qkv_bias=False)
    assert "no sliding_window, which means sliding_window=4096" in problem
    windowed = mistral(original | {"sliding_window": 64, "max_position_embeddings": 64})
    language = replace(LANGUAGE, weights=str(windowed), qkv_bias=False)
    found = [each for each in language_problems(language, {"sft": 65}) if each.level == "error"]
    assert len(found) == 1 and "stages.sft.sequence_length=65 is longer than" in found[0].text


def test_llama_has_no_biases(llama_files: Path) -> None:
    (problem,) = errors(llama_files, qkv_bias=True)
    assert "model.language.qkv_bias=true but" in problem and "model_type=llama" in problem


def test_keys_that_change_nothing_are_accepted(qwen2: Write, qwen2_files: Path) -> None:
    original = json.loads((qwen2_files / "config.json").read_text())
    harmless = {
        "initializer_range": 0.5, "use_cache": False, "transformers_version": "4.37.0",
        "attention_dropout": 0.3, "bos_token_id": 3, "eos_token_id": [4, 5], "pad_token_id": 7,
        "_name_or_path": "elsewhere", "max_window_layers": 0, "sliding_window": 4,
        "max_position_embeddings": 4096, "temperature": 0.7, "rope_scaling": None, "torch_dtype": "float32",
        "id2label": {"0": "a"}, "output_attentions": False, "tokenizer_class": "Qwen2Tokenizer",
    }  # fmt: skip
    expected = logits(qwen2_files)
    for key, value in harmless.items():
        directory = qwen2(original | {key: value})
        assert errors(directory) == [], key
        assert not changes_logits(directory, expected), key


def test_absent_keys_mean_the_defaults_of_transformers(qwen2: Write, qwen2_files: Path) -> None:
    original = json.loads((qwen2_files / "config.json").read_text())
    for key, default in (
        ("rms_norm_eps", "1e-06"), ("num_key_value_heads", "32"), ("rope_parameters", "10000.0"),
        ("hidden_size", "4096"), ("intermediate_size", "22016"), ("vocab_size", "151936"),
    ):  # fmt: skip
        config = {name: value for name, value in original.items() if name != key}
        message = "\n".join(errors(qwen2(config)))
        assert f"={default}" in message and "no " in message, message


def test_dynamic_scaling_bounds_the_sequence(qwen2: Write, qwen2_files: Path) -> None:
    """Dynamic NTK changes RoPE beyond max_position_embeddings, and nothing up to it."""
    original = stored_like_nvlm_d(json.loads((qwen2_files / "config.json").read_text()))
    language = replace(LANGUAGE, weights=str(qwen2(original)))
    assert list(language_problems(language, {"pretrain": 64, "sft": 64})) == []
    (problem,) = language_problems(language, {"pretrain": 64, "sft": 65})
    assert problem.level == "error"
    assert "stages.sft.sequence_length=65 is longer than max_position_embeddings=64" in problem.text
    assert problem.remedy == "use a sequence_length of at most 64"


def test_positions_that_the_weights_have_not_seen_are_a_warning(qwen2_files: Path) -> None:
    language = replace(LANGUAGE, weights=str(qwen2_files))
    (problem,) = language_problems(language, {"sft": 65})
    assert problem.level == "warning" and "sequence_length=65" in problem.text


def test_all_problems_come_at_once(qwen2: Write, qwen2_files: Path) -> None:
    original = json.loads((qwen2_files / "config.json").read_text())
    wrong = {
        "hidden_act": "gelu",
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "new": 1,
    }
    found = "\n".join(errors(qwen2(original | wrong), num_layers=3))
    for word in (*wrong, "num_hidden_layers", "missing=['model.layers.2."):
        assert word in found


def test_a_config_that_is_no_config_is_named(qwen2: Write) -> None:
    directory = qwen2({})
    for text, message in (
        ("[]", "is no JSON object"),
        ("{", "cannot be read"),
        ("{}", "no model_type"),
    ):
        (directory / "config.json").write_text(text)
        (problem,) = errors(directory)
        assert message in problem


@pytest.mark.parametrize("row", [None, 0, 63])
def test_a_second_table_beside_a_tied_one_must_be_the_same(
    qwen2: Write, qwen2_files: Path, row: int | None
) -> None:
    """Qwen3-0.6B's files have both. transformers does not tie two that differ, whatever the key says."""
    config = json.loads((qwen2_files / "config.json").read_text()) | {"tie_word_embeddings": True}
    directory = qwen2(config)
    state = load_file(qwen2_files / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    if row is not None:
        state["lm_head.weight"][row] += 1.0
    (directory / "model.safetensors").unlink()
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    found = errors(directory, tied_embeddings=True)
    if row is None:
        assert found == []
        return
    (problem,) = found
    assert (
        "tie_word_embeddings=true, but lm_head.weight is not model.embed_tokens.weight" in problem
    )
    tied = logits(directory)
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    assert torch.equal(tied, logits(directory))
