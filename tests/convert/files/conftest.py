"""A tiny Qwen2 and a tiny InternVL vision encoder of transformers, as save_pretrained writes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.convert.files.models import LANGUAGE, VISION, randomise
from tests.hugging_face import encoder_sizes, sizes

Write = Callable[[dict[str, Any]], Path]


def saved(model: torch.nn.Module, directory: Path) -> Path:
    """Gives a model weights that count, and saves it."""
    randomise(model).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def qwen2_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.safetensors and config.json."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(**sizes(LANGUAGE), max_position_embeddings=64, max_window_layers=1)
    return saved(Qwen2ForCausalLM(config), tmp_path_factory.mktemp("tiny-qwen2"))


@pytest.fixture(scope="session")
def llama_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.safetensors and config.json of a Llama without scaled RoPE, as Yi is one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**sizes(LANGUAGE), max_position_embeddings=64)
    return saved(LlamaForCausalLM(config), tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def qwen3_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.safetensors and config.json of a Qwen3 with heads of a size of their own."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**sizes(LANGUAGE), head_dim=12, max_position_embeddings=64)
    return saved(Qwen3ForCausalLM(config), tmp_path_factory.mktemp("tiny-qwen3"))


@pytest.fixture(scope="session")
def mistral_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.safetensors and config.json of a Mistral without a window."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(**sizes(LANGUAGE), sliding_window=None, max_position_embeddings=64)
    return saved(MistralForCausalLM(config), tmp_path_factory.mktemp("tiny-mistral"))


@pytest.fixture(scope="session")
def encoder_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.safetensors and config.json."""
    from transformers.models.internvl.configuration_internvl import InternVLVisionConfig
    from transformers.models.internvl.modeling_internvl import InternVLVisionModel

    config = InternVLVisionConfig(**encoder_sizes(VISION))
    return saved(InternVLVisionModel(config), tmp_path_factory.mktemp("tiny-encoder"))


@pytest.fixture
def qwen2(qwen2_files: Path, tmp_path: Path) -> Write:
    """`qwen2(config)`: a directory with the same weights and that config.json."""
    return lambda config: _linked(qwen2_files, tmp_path, config)


@pytest.fixture
def llama(llama_files: Path, tmp_path: Path) -> Write:
    """`llama(config)`: a directory with the same weights and that config.json."""
    return lambda config: _linked(llama_files, tmp_path, config)


@pytest.fixture
def qwen3(qwen3_files: Path, tmp_path: Path) -> Write:
    """`qwen3(config)`: a directory with the same weights and that config.json."""
    return lambda config: _linked(qwen3_files, tmp_path, config)


@pytest.fixture
def mistral(mistral_files: Path, tmp_path: Path) -> Write:
    """`mistral(config)`: a directory with the same weights and that config.json."""
    return lambda config: _linked(mistral_files, tmp_path, config)


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
