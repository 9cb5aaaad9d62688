"""InternViT-300M's kind: LayerNorms, biases on queries, keys and values, and no norms of queries and keys.

Everything else is InternViT-6B's. Parameter names follow transformers' as InternViT-6B's do.
"""

from __future__ import annotations

from torch import Tensor, nn

from nvlm_train.config.model_schema import VisionConfig
from nvlm_train.vision.attention import QueryKeyValue, attend_fused
from nvlm_train.vision.intern_vit import InternViT, Layer


class BiasedAttention(nn.Module):
    """Full attention with biases on queries, keys and values, which have no norms."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = QueryKeyValue(config.hidden_size, bias=True)
        self.projection_layer = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x_TPH: Tensor) -> Tensor:
        return self.projection_layer(attend_fused(self.qkv(x_TPH), self.num_heads))


class LayerNormLayer(Layer):
    """Pre-norm attention and MLP with LayerNorms."""

    norm_kind = nn.LayerNorm
    attention_kind = BiasedAttention


class InternViT300M(InternViT):
    """Turns uint8 tiles into pixel-shuffled features, as InternViT-300M does."""

    layer_kind = LayerNormLayer
