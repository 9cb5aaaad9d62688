"""SigLIP's kind of vision encoder, unsharded, inference only.

Its features are what transformers' `SiglipVisionModel` returns as `last_hidden_state`: the last layer's
states behind `post_layernorm`. That norm was trained with the encoder, and PaliGemma and SmolVLM read the
same states; the pooling head behind it, which leaves one vector of an image, is not used. LLaVA's habit,
the layer before the last without a norm, is from CLIP, whose last layer serves its class token only;
SigLIP has none. Parameter names follow transformers' model, but for queries, keys and values, which are one
matrix here (convert/encoders/siglip.py says where its parts lie).
Shape legend: T tiles, C channels, E tile edge, P patches of a tile, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nvlm_train.config.model_schema import VisionConfig
from nvlm_train.geometry import patches_per_side
from nvlm_train.vision.attention import QueryKeyValue, attend_fused
from nvlm_train.vision.compiled import compiled_on_gpu
from nvlm_train.vision.features import Distribution, normalised, pixel_shuffle

_HALF = Distribution(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
"""How SigLIP's pixels are normalised."""


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
        self.num_heads = config.num_heads
        self.qkv = QueryKeyValue(config.hidden_size, bias=True)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x_TPH: Tensor) -> Tensor:
        return self.out_proj(attend_fused(self.qkv(x_TPH), self.num_heads))


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

    @compiled_on_gpu
    def forward(self, x_TPH: Tensor) -> Tensor:
        """Computes the next states, [T, P, H]."""
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
        return self._through_layers(self.embeddings(pixels_TCEE))

    @torch.no_grad()
    def forward(self, tiles_TCEE: Tensor) -> Tensor:
        """Computes the features that the projector reads.

        Args:
            tiles_TCEE: uint8 [T, 3, E, E], RGB.

        Returns:
            [T, tokens per tile, hidden * 4], of the encoder's dtype.
        """
        x_TPH = self._embed(tiles_TCEE, *_HALF.on(tiles_TCEE.device))
        return pixel_shuffle(self._through_layers(x_TPH))

    @compiled_on_gpu
    def _embed(self, tiles_TCEE: Tensor, mean_C11: Tensor, std_C11: Tensor) -> Tensor:
        return self.embeddings(normalised(tiles_TCEE, mean_C11, std_C11).to(self.dtype))

    def _through_layers(self, x_TPH: Tensor) -> Tensor:
        for layer in self.encoder["layers"].children():
            x_TPH = layer(x_TPH)
        return self.post_layernorm(x_TPH)
