"""A small Qwen2 and Llama of transformers with random weights, and what save_pretrained made of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.hugging_face import sizes
from tests.parity.recipes import LANGUAGE


@pytest.fixture(scope="session")
def qwen2() -> torch.nn.Module:
    """Of the sizes of the parity tests' language model; norms and biases away from one and zero."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return randomised(Qwen2ForCausalLM(Qwen2Config(**sizes(LANGUAGE))).eval())


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Weights of a size at which logits differ from zero, and from each other's."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            offset = 1.0 if "norm" in name else 0.0
            parameter.copy_(offset + 0.15 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="session")
def qwen2_dir(qwen2: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In several safetensors files, as large models come."""
    directory = tmp_path_factory.mktemp("qwen2")
    qwen2.save_pretrained(directory, max_shard_size="200KB")
    assert len(list(directory.glob("*.safetensors"))) > 1
    return directory


@pytest.fixture(scope="session")
def llama() -> torch.nn.Module:
    """Of the same sizes, without biases and with plain RoPE, as Yi is one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return randomised(LlamaForCausalLM(LlamaConfig(**sizes(LANGUAGE))).eval())


LLAMA_3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32, "rope_theta": LANGUAGE.rope_theta,
}  # fmt: skip


@pytest.fixture(scope="session")
def llama_3() -> torch.nn.Module:
    """Of Llama 3.2's kind: tied tables, and RoPE stretched from 32 positions, with packs of up to 96."""
    from transformers import LlamaConfig, LlamaForCausalLM

    own = {"rope_parameters": LLAMA_3, "tie_word_embeddings": True, "head_dim": 24}
    names = sizes(LANGUAGE)
    names.pop("rope_theta")
    return randomised(LlamaForCausalLM(LlamaConfig(**names | own)).eval())


@pytest.fixture(scope="session")
def llama_3_dir(llama_3: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In one file, without a table for the output layer."""
    directory = tmp_path_factory.mktemp("llama-3")
    llama_3.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def llama_dir(llama: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In one file."""
    directory = tmp_path_factory.mktemp("llama")
    llama.save_pretrained(directory)
    return directory
