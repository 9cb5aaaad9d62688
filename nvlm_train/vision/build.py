"""Builds the frozen vision encoder from a recipe: weights from safetensors, or seeded random ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nvlm_train.config.schema import VisionConfig
from nvlm_train.convert.problem import refuse
from nvlm_train.convert.vision import encoder_files, kind_of, vision_problems
from nvlm_train.convert.weight_files import WeightFiles
from nvlm_train.vision.encoder import KINDS, VisionEncoder


def build_vision_encoder(
    config: VisionConfig, dtype: torch.dtype, device: torch.device, seed: int
) -> VisionEncoder:
    """The encoder in evaluation mode with gradients off, equal on every rank.

    With `config.weights` it is built on the meta device, and gets memory on `device` and in `dtype` only:
    a whole encoder in fp32 on the host of every rank would be 22 GB for InternViT-6B.

    Raises:
        ConfigError: there is no encoder of this kind.
        CheckpointError: the weights' config or tensors do not fit `config`.
    """
    kind_of(config)
    if config.weights is None:
        encoder = _module(config)
        _initialise(encoder, seed)
        encoder.to(device=device, dtype=dtype)
    else:
        with torch.device("meta"):
            encoder = _module(config)
        _load(encoder, config, dtype, device)
    frozen: VisionEncoder = encoder.eval().requires_grad_(False)
    return frozen


def _module(config: VisionConfig) -> Any:
    """The recipe's encoder, on the device that is torch's default here."""
    encoder = KINDS[config.kind](config)
    assert isinstance(encoder, nn.Module), f"{config.kind}: not a torch module"
    return encoder


def _initialise(encoder: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in encoder.named_parameters():
        if "norm" in name or "lambda" in name:
            continue  # ones, as constructed
        with torch.no_grad():
            parameter.normal_(std=0.02, generator=generator)


@torch.no_grad()
def _load(
    encoder: nn.Module, config: VisionConfig, dtype: torch.dtype, device: torch.device
) -> None:
    """Gives an encoder on the meta device its memory, one tensor at a time, and what the files have."""
    refuse(vision_problems(config))
    layout, tensors = encoder_files(config)
    with WeightFiles(tensors, f"model.vision.weights={config.weights}") as files:
        state = {}
        for name, empty in encoder.state_dict().items():
            place = layout.place(name, config, tensors)
            state[name] = torch.empty_like(empty, dtype=dtype, device=device)
            files.copy_into(state[name], place.stored, place.index)
    encoder.load_state_dict(state, assign=True)
    left = [name for name, tensor in encoder.named_buffers() if tensor.is_meta]
    assert not left, f"{config.kind}: {left} are in no file; compute them in forward"
