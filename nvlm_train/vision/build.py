"""Builds the frozen vision encoder from a recipe: weights from safetensors, or seeded random ones."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from nvlm_train.config.schema import VisionConfig
from nvlm_train.convert.problem import refuse
from nvlm_train.convert.vision import FILE, PREFIX, kind_of, vision_problems
from nvlm_train.vision.encoder import KINDS, VisionEncoder


def build_vision_encoder(
    config: VisionConfig, dtype: torch.dtype, device: torch.device, seed: int
) -> VisionEncoder:
    """The encoder in evaluation mode with gradients off, equal on every rank.

    Raises:
        ConfigError: there is no encoder of this kind.
        CheckpointError: the weights' config or tensors do not fit `config`.
    """
    kind_of(config)
    encoder = KINDS[config.kind](config)
    assert isinstance(encoder, nn.Module), f"{config.kind}: not a torch module"
    if config.weights is None:
        _initialise(encoder, seed)
    else:
        _load(encoder, config, Path(config.weights))
    frozen: VisionEncoder = encoder.to(device=device, dtype=dtype).eval().requires_grad_(False)
    return frozen


def _initialise(encoder: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in encoder.named_parameters():
        if "norm" in name or "lambda" in name:
            continue  # ones, as constructed
        with torch.no_grad():
            parameter.normal_(std=0.02, generator=generator)


def _load(encoder: nn.Module, config: VisionConfig, directory: Path) -> None:
    from safetensors.torch import load_file

    refuse(vision_problems(config))
    state = load_file(directory / FILE)
    encoder.load_state_dict({name.removeprefix(PREFIX): state[name] for name in state})
