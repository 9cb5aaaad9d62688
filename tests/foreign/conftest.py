"""A tiny Qwen2 and a tiny InternVL vision encoder of transformers, as save_pretrained writes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.foreign.models import LANGUAGE, VISION, randomise

Write = Callable[[dict[str, Any]], Path]


@pytest.fixture(scope="session")
def qwen2_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.safetensors and config.json."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=LANGUAGE.vocab_size,
        hidden_size=LANGUAGE.hidden_size,
        num_hidden_layers=LANGUAGE.num_layers,
        num_attention_heads=LANGUAGE.num_heads,
        num_key_value_heads=LANGUAGE.num_kv_heads,
        intermediate_size=LANGUAGE.ffn_hidden_size,
        rms_norm_eps=LANGUAGE.norm_eps,
        rope_theta=LANGUAGE.rope_theta,
        max_position_embeddings=64,
        max_window_layers=1,
        tie_word_embeddings=False,
    )
    directory = tmp_path_factory.mktemp("tiny-qwen2")
    randomise(Qwen2ForCausalLM(config)).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def llama_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.safetensors and config.json of a Llama without scaled RoPE, as Yi is one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=LANGUAGE.vocab_size,
        hidden_size=LANGUAGE.hidden_size,
        num_hidden_layers=LANGUAGE.num_layers,
        num_attention_heads=LANGUAGE.num_heads,
        num_key_value_heads=LANGUAGE.num_kv_heads,
        intermediate_size=LANGUAGE.ffn_hidden_size,
        rms_norm_eps=LANGUAGE.norm_eps,
        rope_theta=LANGUAGE.rope_theta,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    directory = tmp_path_factory.mktemp("tiny-llama")
    randomise(LlamaForCausalLM(config)).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def encoder_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.safetensors and config.json."""
    from transformers.models.internvl.configuration_internvl import InternVLVisionConfig
    from transformers.models.internvl.modeling_internvl import InternVLVisionModel

    config = InternVLVisionConfig(
        num_hidden_layers=VISION.num_layers,
        hidden_size=VISION.hidden_size,
        num_attention_heads=VISION.num_heads,
        intermediate_size=VISION.ffn_hidden_size,
        image_size=VISION.tile_size,
        patch_size=VISION.patch_size,
        use_qk_norm=True,
        norm_type="rms_norm",
    )
    directory = tmp_path_factory.mktemp("tiny-encoder")
    randomise(InternVLVisionModel(config)).save_pretrained(directory)
    return directory


@pytest.fixture
def qwen2(qwen2_files: Path, tmp_path: Path) -> Write:
    """`qwen2(config)`: a directory with the same weights and that config.json."""
    return lambda config: _linked(qwen2_files, tmp_path, config)


@pytest.fixture
def llama(llama_files: Path, tmp_path: Path) -> Write:
    """`llama(config)`: a directory with the same weights and that config.json."""
    return lambda config: _linked(llama_files, tmp_path, config)


@pytest.fixture
def encoder(encoder_files: Path, tmp_path: Path) -> Write:
    """`encoder(config)`: a directory with the same weights and that config.json."""
    return lambda config: _linked(encoder_files, tmp_path, config)


def _linked(files: Path, tmp_path: Path, config: dict[str, Any]) -> Path:
    directory = tmp_path / f"copy-{len(list(tmp_path.glob('copy-*')))}"
    directory.mkdir()
    (directory / "model.safetensors").symlink_to(files / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(autouse=True)
def few_threads() -> None:
    """Tiny products are slower with more."""
    torch.set_num_threads(1)
