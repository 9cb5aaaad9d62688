"""InternViT-300M's kind: LayerNorms, biases on queries, keys and values, and no norms of queries and keys.

Everything else is InternViT-6B's. Parameter names follow transformers' `InternVLVisionModel`.
"""

from __future__ import annotations

from torch import Tensor, nn

from nvlm_train.config.schema import VisionConfig
from nvlm_train.vision.intern_vit import Attention, InternViT, Layer


class BiasedAttention(Attention):
    """Full attention with biases on queries, keys and values, which have no norms."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(config)
        hidden = config.hidden_size
        self.q_proj = nn.Linear(hidden, hidden)
        self.k_proj = nn.Linear(hidden, hidden)
        self.v_proj = nn.Linear(hidden, hidden)
        del self.q_norm, self.k_norm

    def project(self, x_TPH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Computes queries, keys and values, each [T, P, H]."""
        return self.q_proj(x_TPH), self.k_proj(x_TPH), self.v_proj(x_TPH)


class LayerNormLayer(Layer):
    """Pre-norm attention and MLP with LayerNorms."""

    norm_kind = nn.LayerNorm
    attention_kind = BiasedAttention


class InternViT300M(InternViT):
    """Turns uint8 tiles into pixel-shuffled features, as InternViT-300M does."""

    layer_kind = LayerNormLayer
