"""Published models made small, as save_pretrained leaves them: what a recipe's `from` may name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from nvlm_train.config.model_schema import LanguageConfig, VisionConfig
from tests.hugging_face import sizes, transformers_encoder


def write_qwen(directory: Path, language: LanguageConfig, tokenizer: Path) -> Path:
    """Writes a Qwen2 of these sizes with random weights, and the tokenizer beside it."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(5)
    stated = sizes(language) | {"tie_word_embeddings": language.tied_embeddings}
    Qwen2ForCausalLM(Qwen2Config(**stated)).save_pretrained(directory)
    shutil.copy(tokenizer, directory / "tokenizer.json")
    config = json.loads((directory / "config.json").read_text())
    assert config["tie_word_embeddings"] == language.tied_embeddings
    return directory


def write_encoder(directory: Path, vision: VisionConfig) -> Path:
    """Writes an encoder of this kind and these sizes with random weights."""
    transformers_encoder(vision).save_pretrained(directory)
    return directory
