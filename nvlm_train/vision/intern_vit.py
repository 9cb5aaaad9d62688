"""InternViT-6B's kind: the vision encoder of NVLM 1.0 (section 4.1), unsharded, inference only.

Parameter names follow transformers' `InternVLVisionModel`, but for queries, keys and values, which are one
matrix here (convert/encoders/intern_vit.py says where its parts lie).
Shape legend: T tiles, C channels, E tile edge, P patches of a tile + class token, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nvlm_train.config.model_schema import VisionConfig
from nvlm_train.geometry import patches_per_side
from nvlm_train.vision.attention import QueryKeyValue, attend
from nvlm_train.vision.compiled import compiled_on_gpu
from nvlm_train.vision.features import IMAGENET, normalised, pixel_shuffle


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension; one kernel on a GPU, which sums in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Embeddings(nn.Module):
    """Patches by convolution, a class token first, learned absolute positions."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        hidden, patch = config.hidden_size, config.patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, hidden))
        num_positions = patches_per_side(config) ** 2 + 1
        self.position_embeddings = nn.Parameter(torch.zeros(1, num_positions, hidden))
        self.patch_embeddings = nn.ModuleDict(
            {"projection": nn.Conv2d(3, hidden, kernel_size=patch, stride=patch)}
        )

    def forward(self, pixels_TCEE: Tensor) -> Tensor:
        patches_TPH = self.patch_embeddings["projection"](pixels_TCEE).flatten(2).transpose(1, 2)
        class_TPH = self.cls_token.expand(len(pixels_TCEE), -1, -1)
        return torch.cat([class_TPH, patches_TPH], dim=1) + self.position_embeddings


class Attention(nn.Module):
    """Full attention. The norms of queries and keys run over the whole width, not over each head's
    channels, as in the released InternViT-6B."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.num_heads = config.num_heads
        self.qkv = QueryKeyValue(hidden, bias=False)
        self.q_norm = RMSNorm(hidden, config.norm_eps)
        self.k_norm = RMSNorm(hidden, config.norm_eps)
        self.projection_layer = nn.Linear(hidden, hidden)

    def forward(self, x_TPH: Tensor) -> Tensor:
        query, key, value = self.qkv(x_TPH).chunk(3, dim=-1)
        attended = attend(self.q_norm(query), self.k_norm(key), value, self.num_heads)
        return self.projection_layer(attended)


class MLP(nn.Module):
    """Two linears with biases around an exact GELU."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.ffn_hidden_size)
        self.fc2 = nn.Linear(config.ffn_hidden_size, config.hidden_size)

    def forward(self, x_TPH: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_TPH)))


class Layer(nn.Module):
    """Pre-norm attention and MLP, each scaled by a learned vector before the residual."""

    norm_kind: Callable[[int, float], nn.Module] = RMSNorm
    attention_kind: Callable[[VisionConfig], nn.Module] = Attention

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.layernorm_before = self.norm_kind(hidden, config.norm_eps)
        self.attention = self.attention_kind(config)
        self.lambda_1 = nn.Parameter(torch.ones(hidden))
        self.layernorm_after = self.norm_kind(hidden, config.norm_eps)
        self.mlp = MLP(config)
        self.lambda_2 = nn.Parameter(torch.ones(hidden))

    @compiled_on_gpu
    def forward(self, x_TPH: Tensor) -> Tensor:
        """Computes the next states, [T, P, H]."""
        attended = self.attention(self.layernorm_before(x_TPH))
        x_TPH = torch.addcmul(x_TPH, self.lambda_1, attended)
        return torch.addcmul(x_TPH, self.lambda_2, self.mlp(self.layernorm_after(x_TPH)))


class InternViT(nn.Module):
    """Turns uint8 tiles into pixel-shuffled features. It has no final norm and drops the class token."""

    layer_kind: Callable[[VisionConfig], nn.Module] = Layer

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = nn.ModuleDict(
            {"layer": nn.ModuleList([self.layer_kind(config) for _ in range(config.num_layers)])}
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.embeddings.cls_token.dtype

    @property
    def device(self) -> torch.device:
        return self.embeddings.cls_token.device

    def hidden_states(self, pixels_TCEE: Tensor) -> Tensor:
        """Computes the last layer's states, class token included.

        Args:
            pixels_TCEE: normalised pixels, [T, 3, E, E], of the encoder's dtype.

        Returns:
            [T, 1 + patches, hidden].
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
        x_TPH = self._embed(tiles_TCEE, *IMAGENET.on(tiles_TCEE.device))
        return pixel_shuffle(self._through_layers(x_TPH)[:, 1:])

    @compiled_on_gpu
    def _embed(self, tiles_TCEE: Tensor, mean_C11: Tensor, std_C11: Tensor) -> Tensor:
        return self.embeddings(normalised(tiles_TCEE, mean_C11, std_C11).to(self.dtype))

    def _through_layers(self, x_TPH: Tensor) -> Tensor:
        for layer in self.encoder["layer"].children():
            x_TPH = layer(x_TPH)
        return x_TPH
