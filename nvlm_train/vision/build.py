"""Builds the frozen vision encoder from a recipe: weights from safetensors, or seeded random ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nvlm_train.config.model_schema import VisionConfig
from nvlm_train.convert.problem import refuse
from nvlm_train.convert.vision import encoder_files, kind_of, vision_problems
from nvlm_train.convert.weight_files import WeightFiles
from nvlm_train.vision.attention import QueryKeyValue
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
    for name, tensor in _drawn(encoder):
        if "norm" in name or "lambda" in name:
            continue  # ones, as constructed
        with torch.no_grad():
            tensor.normal_(std=0.02, generator=generator)


def _drawn(encoder: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields the weights in the order in which they are drawn: of queries, keys and values one by one.

    Runs of before they were one matrix go on with the same encoder.
    """
    for prefix, module in encoder.named_modules():
        if isinstance(module, QueryKeyValue):
            yield from ((prefix, part) for part in module.apart())
            continue
        for name, parameter in module.named_parameters(recurse=False):
            yield f"{prefix}.{name}", parameter


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
            state[name] = torch.empty_like(empty, dtype=dtype, device=device)
            places = layout.places(name, config, tensors)
            for part, place in zip(state[name].chunk(len(places)), places, strict=True):
                files.copy_into(part, place.stored, place.index)
    encoder.load_state_dict(state, assign=True)
    left = [name for name, tensor in encoder.named_buffers() if tensor.is_meta]
    assert not left, f"{config.kind}: {left} are in no file; compute them in forward"
