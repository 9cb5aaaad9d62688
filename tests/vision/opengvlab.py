"""OpenGVLab's InternViT written anew from its published description, to compare with. None of our code.

Modules have the names of `modeling_intern_vit.py`, so that `state_dict()` has the published names. With
dummy heads it is the encoder inside NVLM-D: more heads in `qkv` and `proj`, and norms of queries and keys
that divide the sum of squares of the real channels by their number.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

Json = dict[str, Any]
CONFIG: Json = {
    "architectures": ["InternVisionModel"], "attention_dropout": 0.0,
    "auto_map": {"AutoModel": "modeling_intern_vit.InternVisionModel"},
    "drop_path_rate": 0.0, "dropout": 0.0, "hidden_act": "gelu", "hidden_size": 40, "image_size": 32,
    "initializer_factor": 0.1, "initializer_range": 1e-10, "intermediate_size": 72,
    "layer_norm_eps": 1e-6, "model_type": "intern_vit_6b", "num_attention_heads": 5, "num_channels": 3,
    "num_hidden_layers": 3, "patch_size": 4, "qk_normalization": True, "qkv_bias": False,
    "torch_dtype": "float32", "transformers_version": "4.37.2", "use_flash_attn": True,
}  # fmt: skip
"""The config.json of InternViT-6B-448px-V1-5 with small sizes; it says nothing of the norms."""
CONFIG_300M: Json = CONFIG | {
    "norm_type": "layer_norm", "qk_normalization": False, "qkv_bias": True,
}  # fmt: skip
ACTIVATIONS = {"gelu": nn.functional.gelu, "relu": nn.functional.relu}


class RMS(nn.Module):
    def __init__(self, width: int, eps: float, real: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps, self.real = eps, real

    def forward(self, x: Tensor) -> Tensor:
        mean_square = (x[..., : self.real] ** 2).sum(-1, keepdim=True) / self.real
        return x / torch.sqrt(mean_square + self.eps) * self.weight


def norm(config: Json) -> nn.Module:
    width, eps = config["hidden_size"], config.get("layer_norm_eps", 1e-6)
    kind = config.get("norm_type", "rms_norm")
    return {"rms_norm": RMS(width, eps, width), "layer_norm": nn.LayerNorm(width, eps=eps)}[kind]


class Attn(nn.Module):
    def __init__(self, config: Json, dummy_heads: int) -> None:
        super().__init__()
        width, self.heads = config["hidden_size"], config["num_attention_heads"]
        self.head = width // self.heads
        self.heads += dummy_heads
        padded = self.heads * self.head
        self.qkv = nn.Linear(width, 3 * padded, bias=config.get("qkv_bias", False))
        self.proj = nn.Linear(padded, width)
        if config.get("qk_normalization", True):
            self.q_norm, self.k_norm = (
                RMS(padded, config.get("layer_norm_eps", 1e-6), width) for _ in range(2)
            )

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.heads, self.head)
        q, k, v = (qkv[:, :, number] for number in range(3))
        if hasattr(self, "q_norm"):
            q = self.q_norm(q.flatten(2)).view_as(q)
            k = self.k_norm(k.flatten(2)).view_as(k)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / self.head**0.5
        mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
        return self.proj(mixed.reshape(batch, length, -1))


class Mlp(nn.Module):
    def __init__(self, config: Json) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config["hidden_size"], config["intermediate_size"])
        self.fc2 = nn.Linear(config["intermediate_size"], config["hidden_size"])
        self.act = ACTIVATIONS[config.get("hidden_act", "gelu")]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, config: Json, dummy_heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(config), norm(config)
        self.attn, self.mlp = Attn(config, dummy_heads), Mlp(config)
        self.ls1, self.ls2 = (nn.Parameter(torch.ones(config["hidden_size"])) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x)) * self.ls1
        return x + self.mlp(self.norm2(x)) * self.ls2


class Embeddings(nn.Module):
    def __init__(self, config: Json) -> None:
        super().__init__()
        width, patch = config["hidden_size"], config.get("patch_size", 14)
        side = config.get("image_size", 224) // patch
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch)
        self.position_embedding = nn.Parameter(torch.zeros(1, side * side + 1, width))

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).mT
        first = self.class_embedding.expand(len(pixels), 1, -1)
        return torch.cat([first, patches], 1) + self.position_embedding


class InternVisionModel(nn.Module):
    def __init__(self, config: Json, dummy_heads: int = 0) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        blocks = [Block(config, dummy_heads) for _ in range(config["num_hidden_layers"])]
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(blocks)})

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        x = self.embeddings(pixels)
        for block in self.encoder["layers"].children():
            x = block(x)
        return x


def random_model(config: Json, dummy_heads: int = 0) -> InternVisionModel:
    """Weights away from zero and one everywhere; dummy heads have values and columns of zeros."""
    model = InternVisionModel(config, dummy_heads).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_scale = "norm" in name and name.endswith("weight") or name.endswith(("ls1", "ls2"))
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(float(is_scale) + 0.2 * noise)
        width = config["hidden_size"]
        for block in model.encoder["layers"].children():
            # Queries and keys of dummy heads stay random: they must not matter.
            padded = block.attn.proj.in_features
            block.attn.qkv.weight[2 * padded + width :] = 0
            block.attn.proj.weight[:, width:] = 0
    return model


def write(
    directory: Path, config: Json, state: dict[str, Tensor], files: int = 1, prefix: str = ""
) -> Path:
    """A directory as the hub has it: config.json, and one safetensors file or several with an index."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    named = {prefix + name: tensor.contiguous() for name, tensor in state.items()}
    if files == 1:
        save_file(named, directory / "model.safetensors")
        return directory
    places = {
        name: f"model-{1 + number % files:05d}-of-{files:05d}.safetensors"
        for number, name in enumerate(named)
    }
    for file in set(places.values()):
        save_file({name: named[name] for name in named if places[name] == file}, directory / file)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory
