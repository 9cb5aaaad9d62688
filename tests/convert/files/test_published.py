"""config.json files as they are published, with their keys, beside tensors of their sizes: accepted.

Sizes are made small; every other key is as it lies on the hub (Qwen2 and Qwen2.5, Yi-34B, InternVL's
conversion of InternViT-6B to transformers' layout, NVLM-D 72B's language model, SmolLM2-135M-Instruct).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from nvlm_train.convert.language import language_problems
from nvlm_train.convert.vision import vision_problems
from tests.convert.files.conftest import Write
from tests.convert.files.models import LANGUAGE, VISION

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 1000.0, "vocab_size": 64,
}  # fmt: skip
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 32768,
    "max_window_layers": 80, "model_type": "qwen2", "sliding_window": 131072, "tie_word_embeddings": False,
    "torch_dtype": "float32", "transformers_version": "4.40.1", "use_cache": True,
    "use_sliding_window": False,
}  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen2-72B-Instruct": QWEN2,
    "Qwen2.5-7B": QWEN2 | {"use_mrope": False, "max_window_layers": 28},
    "NVLM-D 72B's language model": QWEN2
    | {
        "rope_scaling": {"factor": 3.0, "type": "dynamic"}, "attention_bias": True, "mlp_bias": False,
        "pretraining_tp": 1, "_name_or_path": "", "add_cross_attention": False, "top_k": 50,
        "bad_words_ids": None, "chunk_size_feed_forward": 0, "is_decoder": False, "pruned_heads": {},
    },
}  # fmt: skip
YI = {
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "initializer_range": 0.02, "max_position_embeddings": 4096, "model_type": "llama", "pad_token_id": 0,
    "pretraining_tp": 1, "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float32",
    "transformers_version": "4.34.0", "use_cache": False,
}  # fmt: skip
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 1, "eos_token_id": [2, 3], "hidden_act": "silu", "initializer_range": 0.02,
    "max_position_embeddings": 8192, "mlp_bias": False, "model_type": "llama", "pretraining_tp": 1,
    "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float32",
    "transformers_version": "4.43.0.dev0", "use_cache": True,
}  # fmt: skip
LLAMAS: dict[str, dict[str, Any]] = {
    "Nous-Hermes-2-Yi-34B": YI
    | {"_name_or_path": "01-ai/Yi-34B", "attention_bias": False, "attention_dropout": 0.0, "eos_token_id": 7},
    # Copies of before meta-llama's own were corrected.
    "Llama-2-13b": YI | {"pretraining_tp": 2, "max_length": 4096, "_name_or_path": "meta-llama/Llama-2"},
    "Llama-3.2-1B, Unsloth's": LLAMA | {"head_dim": 8, "unsloth_fixed": True, "pad_token_id": 4},
    "SmolLM2-135M": LLAMA | {"is_llama_config": True, "rope_interleaved": False},
    "SmolLM2-135M-Instruct": LLAMA
    | {
        "is_llama_config": True, "rope_interleaved": False, "pad_token_id": 2,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    },
}  # fmt: skip
MISTRAL = {
    "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 32768,
    "model_type": "mistral", "sliding_window": None, "tie_word_embeddings": False,
    "torch_dtype": "float32", "transformers_version": "4.42.0.dev0", "use_cache": True,
}  # fmt: skip
QWEN3 = QWEN2 | {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 12, "rope_scaling": None,
    "max_window_layers": 36, "model_type": "qwen3", "sliding_window": None,
}  # fmt: skip
INTERN_VIT = {
    "architectures": ["InternVisionModel"], "attention_bias": False, "attention_dropout": 0.0,
    "dropout": 0.0, "drop_path_rate": 0.0, "hidden_act": "gelu", "hidden_dropout_prob": 0.0,
    "image_size": [32, 32], "initializer_factor": 0.1, "initializer_range": 1e-10, "layer_norm_eps": 1e-6,
    "layer_scale_init_value": 0.1, "model_type": "internvl_vision", "norm_type": "rms_norm",
    "num_channels": 3, "patch_size": [4, 4], "projection_dropout": 0.0, "torch_dtype": "float32",
    "use_absolute_position_embeddings": True, "use_mask_token": False, "use_mean_pooling": True,
    "use_qk_norm": True, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
    "num_hidden_layers": 2,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_qwens_are_accepted(qwen2: Write, name: str) -> None:
    language = replace(LANGUAGE, weights=str(qwen2(PUBLISHED[name] | SMALL)))
    assert [str(each) for each in language_problems(language, {"sft": 4096})] == []


@pytest.mark.parametrize("config", [YI, *LLAMAS.values()], ids=["Yi-34B", *LLAMAS])
def test_published_llamas_are_accepted(llama: Write, config: dict[str, Any]) -> None:
    language = replace(LANGUAGE, weights=str(llama(config | SMALL)), qkv_bias=False)
    assert [str(each) for each in language_problems(language, {"sft": 4096})] == []


def test_channels_that_turn_in_neighbouring_pairs_are_refused(llama: Write) -> None:
    weights = llama(LLAMAS["SmolLM2-135M"] | SMALL | {"rope_interleaved": True})
    language = replace(LANGUAGE, weights=str(weights), qkv_bias=False)
    (problem,) = language_problems(language, {})
    assert problem.level == "error" and "rope_interleaved=true" in problem.text


@pytest.mark.parametrize("head_dim", [{}, {"head_dim": 8}], ids=["7B-v0.3", "NeMo"])
def test_published_mistrals_are_accepted(mistral: Write, head_dim: dict[str, int]) -> None:
    weights = mistral(MISTRAL | head_dim | SMALL)
    language = replace(LANGUAGE, weights=str(weights), qkv_bias=False)
    assert [str(each) for each in language_problems(language, {"sft": 4096})] == []


def test_published_qwen3s_are_accepted(qwen3: Write) -> None:
    weights = str(qwen3(QWEN3 | SMALL))
    language = replace(LANGUAGE, weights=weights, qkv_bias=False, qk_norm=True, head_dim=12)
    assert [str(each) for each in language_problems(language, {"sft": 4096})] == []


def test_the_same_weights_in_mistral_s_own_form_lie_beside_them(
    mistral: Write, mistral_files: Path
) -> None:
    """Repositories of Mistral: consolidated.safetensors has other names. Alone it is refused by them."""
    weights = mistral(MISTRAL | SMALL)
    language = replace(LANGUAGE, weights=str(weights), qkv_bias=False)
    own = {"layers.0.attention.wq.weight": torch.zeros(32, 32)}
    save_file(own, weights / "consolidated.safetensors")
    assert [str(each) for each in language_problems(language, {})] == []
    (weights / "model.safetensors").unlink()
    texts = "\n".join(each.text for each in language_problems(language, {}))
    assert "no tensor named model.embed_tokens.weight" in texts and "attention.wq" in texts


def test_the_published_encoder_is_accepted(encoder: Write) -> None:
    vision = replace(VISION, weights=str(encoder(INTERN_VIT)))
    assert [str(each) for each in vision_problems(vision)] == []


def test_two_dtypes_are_refused(qwen2: Write) -> None:
    config = QWEN2 | SMALL | {"dtype": "bfloat16"}
    language = replace(LANGUAGE, weights=str(qwen2(config)))
    errors = [each.text for each in language_problems(language, {}) if each.level == "error"]
    assert len(errors) == 1 and "dtype=bfloat16 and torch_dtype=float32" in errors[0]


def test_a_config_that_is_too_deep_is_named(qwen2: Write, tmp_path: Path) -> None:
    directory = qwen2(QWEN2)
    (directory / "config.json").write_text("[" * 100_000)
    (problem,) = language_problems(replace(LANGUAGE, weights=str(directory)), {})
    assert "cannot be read" in problem.text


def test_default_heads_are_those_of_transformers(llama: Write) -> None:
    """Llama has as many KV heads as heads where it says nothing, and 32 heads where it says nothing."""
    config = {
        key: value for key, value in (YI | SMALL).items() if "num_" not in key or "layers" in key
    }
    language = replace(LANGUAGE, weights=str(llama(config)), qkv_bias=False)
    texts = "\n".join(each.text for each in language_problems(language, {}))
    assert "num_heads=4 but" in texts and "num_kv_heads=2 but" in texts
    wide = replace(language, num_heads=32, num_kv_heads=32)
    assert "num_kv_heads" not in "\n".join(each.text for each in language_problems(wide, {}))
    assert json.loads(Path(language.weights or "", "config.json").read_text()) == config
