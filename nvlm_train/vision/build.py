"""Builds the frozen vision encoder from a recipe: weights from safetensors, or seeded random ones."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from nvlm_train.config.model_schema import VisionConfig
from nvlm_train.errors import CheckpointError
from nvlm_train.vision.intern_vit import InternViT

_CONFIG_FIELDS = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_heads",
    "intermediate_size": "ffn_hidden_size",
    "layer_norm_eps": "norm_eps",
}
"""Field of a Hugging Face InternVL vision config -> field of VisionConfig."""
_NEEDED = {"norm_type": "rms_norm", "use_qk_norm": True, "hidden_act": "gelu"}
"""What the code computes, whatever the sizes."""


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

    path = directory / "model.safetensors"
    if not path.is_file():
        raise CheckpointError(
            f"model.vision.weights={directory}: no model.safetensors there; "
            "give the directory that save_pretrained of an InternVL vision model wrote"
        )
    _check_config(encoder.config, directory / "config.json")
    state = {name.removeprefix("vision_tower."): tensor for name, tensor in load_file(path).items()}
    missing, unexpected = encoder.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise CheckpointError(
            f"model.vision.weights={directory} does not fit the recipe: "
            f"missing={sorted(missing)[:3]} unexpected={sorted(unexpected)[:3]}"
        )


def _check_config(config: VisionConfig, path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(
            f"model.vision.weights={path.parent}: no config.json there, so its sizes cannot be checked; "
            "add the one that save_pretrained wrote"
        )
    stored = json.loads(path.read_text())
    fields = {
        **{theirs: (ours, getattr(config, ours)) for theirs, ours in _CONFIG_FIELDS.items()},
        "patch_size": ("patch_size", config.patch_size),
        "image_size": ("tile_size", config.tile_size),
    }
    wrong = [
        f"model.vision.{ours}={value} but {path.name} has {theirs}={stored.get(theirs)}"
        for theirs, (ours, value) in fields.items()
        if stored.get(theirs) not in (value, [value, value])
    ]
    wrong += [
        f"{path.name} has {name}={stored.get(name)}, the vision encoder of NVLM needs {value}"
        for name, value in _NEEDED.items()
        if stored.get(name) != value
    ]
    if wrong:
        raise CheckpointError(f"model.vision.weights={path.parent}: " + "; ".join(wrong))
