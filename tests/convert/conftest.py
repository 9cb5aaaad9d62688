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


@pytest.fixture(scope="session")
def llama_dir(llama: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In one file."""
    directory = tmp_path_factory.mktemp("llama")
    llama.save_pretrained(directory)
    return directory
