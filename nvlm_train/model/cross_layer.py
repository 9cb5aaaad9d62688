"""The optional gated feed-forward after cross-attention, as Flamingo has it."""

from __future__ import annotations

from typing import Any

from megatron.core import tensor_parallel
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)
from torch import Tensor
from torch.nn import functional as F

from nvlm_train.model.cross_attention import Gate
from nvlm_train.model.layers import RMSNorm
from nvlm_train.model.zero_grads import zeros_for


class GatedFeedForwardLayer(TransformerLayer):
    """Self-attention, gated cross-attention, gated feed-forward, feed-forward.

    A token that sees no tile passes both gates unchanged.
    """

    def __init__(
        self, config: TransformerConfig, submodules: TransformerLayerSubmodules, **place: Any
    ) -> None:
        super().__init__(config, submodules, **place)
        self.cross_feed_forward = GatedFeedForward(config, submodules.mlp.submodules)

    def _forward_attention(
        self, *args: Any, context: Tensor | None = None, context_mask: Any = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        hidden_SBH, _ = super()._forward_attention(
            *args, context=context, context_mask=context_mask, **kwargs
        )
        spans = None if context is None else context_mask.tolist()
        output_SBH = self.cross_feed_forward(hidden_SBH, spans)
        # As behind every other branch: megatron-core's bias-dropout-add, without a bias.
        output_SBH = F.dropout(output_SBH, self.hidden_dropout, self.training)
        return hidden_SBH + output_SBH, context


class GatedFeedForward(MegatronModule):
    """The language model's MLP once more, behind a norm and a gate."""

    def __init__(self, config: TransformerConfig, submodules: Any) -> None:
        super().__init__(config)
        self.norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.mlp = MLP(config, submodules)
        self.gate = Gate(config)

    def forward(self, hidden_SBH: Tensor, spans: list[list[int]] | None) -> Tensor:
        """What is added to the residual stream: zero outside the spans."""
        if spans is None:
            return zeros_for(hidden_SBH, self)
        output_SBH, _ = self.mlp(self.norm(hidden_SBH))
        return self.gate(output_SBH) * self._sees(hidden_SBH, spans)

    def _sees(self, hidden_SBH: Tensor, spans: list[list[int]]) -> Tensor:
        sharded = self.config.sequence_parallel
        length = len(hidden_SBH) * (self.config.tensor_model_parallel_size if sharded else 1)
        sees_SBH = hidden_SBH.new_zeros(length, 1, 1)
        for start, stop, _, _ in spans:
            sees_SBH[start:stop] = 1
        if not sharded:
            return sees_SBH
        return tensor_parallel.scatter_to_sequence_parallel_region(sees_SBH)
