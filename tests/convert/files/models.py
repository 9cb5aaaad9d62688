"""Sizes of the tiny models, their random weights, and what transformers computes from a directory."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from nvlm_train.config.model_schema import LanguageConfig, VisionConfig

LANGUAGE = LanguageConfig(
    num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, ffn_hidden_size=48, vocab_size=64,
    rope_theta=1000.0, norm_eps=1e-5,
)  # fmt: skip
VISION = VisionConfig(
    num_layers=2, hidden_size=32, num_heads=4, ffn_hidden_size=48, tile_size=32, patch_size=4
)
IDS = torch.randint(0, 64, (1, 24), generator=torch.Generator().manual_seed(1))
PIXELS = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def randomise(model: nn.Module) -> nn.Module:
    """Weights away from zero and one, so that everything that is computed counts."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            offset = 1.0 if "norm" in name and name.endswith("weight") or "lambda" in name else 0.0
            parameter.copy_(offset + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def logits(directory: Path) -> Tensor:
    """transformers' logits, [S, V]. Raises whatever transformers raises."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(IDS).logits[0]


def features(directory: Path) -> Tensor:
    """transformers' features of a tile, [P, H]. Raises whatever transformers raises."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(PIXELS).last_hidden_state[0]
