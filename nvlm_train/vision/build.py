"""Builds the frozen vision encoder from a recipe: weights from safetensors, or seeded random ones."""

from __future__ import annotations

from pathlib import Path

import torch

from nvlm_train.config.schema import VisionConfig
from nvlm_train.convert.problem import refuse
from nvlm_train.convert.vision import FILE, PREFIX, vision_problems
from nvlm_train.vision.intern_vit import InternViT


def build_vision_encoder(
    config: VisionConfig, dtype: torch.dtype, device: torch.device, seed: int
) -> InternViT:
    """The encoder in evaluation mode with gradients off, equal on every rank.

    Raises:
        CheckpointError: the weights' config or tensors do not fit `config`.
    """
    encoder = InternViT(config)
    if config.weights is None:
        _initialise(encoder, seed)
    else:
        _load(encoder, Path(config.weights))
    return encoder.to(device=device, dtype=dtype).eval().requires_grad_(False)


def _initialise(encoder: InternViT, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in encoder.named_parameters():
        if "norm" in name or "lambda" in name:
            continue  # ones, as constructed
        with torch.no_grad():
            parameter.normal_(std=0.02, generator=generator)


def _load(encoder: InternViT, directory: Path) -> None:
    from safetensors.torch import load_file

    refuse(vision_problems(encoder.config))
    state = load_file(directory / FILE)
    encoder.load_state_dict({name.removeprefix(PREFIX): state[name] for name in state})
