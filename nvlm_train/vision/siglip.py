"""SigLIP's kind of vision encoder, unsharded, inference only.

Its features are what transformers' `SiglipVisionModel` returns as `last_hidden_state`: the last layer's
states behind `post_layernorm`. That norm was trained with the encoder, and PaliGemma and SmolVLM read the
same states; the pooling head behind it, which leaves one vector of an image, is not used. LLaVA's habit,
the layer before the last without a norm, is from CLIP, whose last layer serves its class token only;
SigLIP has none. Parameter names follow transformers' model, so its safetensors load as they are.
Shape legend: T tiles, C channels, E tile edge, P patches of a tile, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nvlm_train.config.schema import VisionConfig
from nvlm_train.geometry import patches_per_side
from nvlm_train.vision.features import normalised, pixel_shuffle

_HALF = (0.5, 0.5, 0.5)
"""SigLIP's mean and standard deviation of each colour."""


class Embeddings(nn.Module):
    """Patches by convolution and learned absolute positions; there is no class token."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        hidden, patch = config.hidden_size, config.patch_size
        self.patch_embedding = nn.Conv2d(3, hidden, kernel_size=patch, stride=patch)
        self.position_embedding = nn.Embedding(patches_per_side(config) ** 2, hidden)

    def forward(self, pixels_TCEE: Tensor) -> Tensor:
        patches_TPH = self.patch_embedding(pixels_TCEE).flatten(2).transpose(1, 2)
        return patches_TPH + self.position_embedding.weight


class Attention(nn.Module):
    """Full attention; every projection has a bias."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.num_heads = config.num_heads
        self.q_proj = nn.Linear(hidden, hidden)
        self.k_proj = nn.Linear(hidden, hidden)
        self.v_proj = nn.Linear(hidden, hidden)
        self.out_proj = nn.Linear(hidden, hidden)

    def forward(self, x_TPH: Tensor) -> Tensor:
        query, key, value = (
            project(x_TPH).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linears with biases around the tanh form of GELU."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.ffn_hidden_size)
        self.fc2 = nn.Linear(config.ffn_hidden_size, config.hidden_size)

    def forward(self, x_TPH: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_TPH), approximate="tanh"))


class Layer(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_TPH: Tensor) -> Tensor:
        x_TPH = x_TPH + self.self_attn(self.layer_norm1(x_TPH))
        return x_TPH + self.mlp(self.layer_norm2(x_TPH))


class Siglip(nn.Module):
    """Turns uint8 tiles into pixel-shuffled features, as SigLIP's vision tower does."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        layers = [Layer(config) for _ in range(config.num_layers)]
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)

    @property
    def dtype(self) -> torch.dtype:
        return self.post_layernorm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.post_layernorm.weight.device

    def hidden_states(self, pixels_TCEE: Tensor) -> Tensor:
        """Computes the last layer's states behind the norm.

        Args:
            pixels_TCEE: normalised pixels, [T, 3, E, E], of the encoder's dtype.

        Returns:
            [T, patches, hidden].
        """
        x_TPH = self.embeddings(pixels_TCEE)
        for layer in self.encoder["layers"].children():
            x_TPH = layer(x_TPH)
        return self.post_layernorm(x_TPH)

    @torch.no_grad()
    def forward(self, tiles_TCEE: Tensor) -> Tensor:
        """Computes the features that the projector reads.

        Args:
            tiles_TCEE: uint8 [T, 3, E, E], RGB.

        Returns:
            [T, tokens per tile, hidden * 4], of the encoder's dtype.
        """
        pixels_TCEE = normalised(tiles_TCEE, _HALF, _HALF).to(self.dtype)
        return pixel_shuffle(self.hidden_states(pixels_TCEE))
