"""Gated cross-attention: the language model reads tiles that are not in its sequence.

NVLM 1.0, sections 4.3 and 4.4, in the slot that megatron-core's TransformerLayer has between
self-attention and MLP (Figure 3). What the paper leaves open is decided in docs/architecture.md.

Shape legend: S tokens of a pack, B batch (always 1), C tokens of its cross-attention context, H
hidden, N this rank's heads, G its KV groups, D channels of a head.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)
from torch import Tensor, nn
from torch.nn import functional as F

from nvlm_train.model.attention.spans import Run, attend_spans, runs_of
from nvlm_train.model.layers import RMSNorm, drawing_for_heads, grouped_attention
from nvlm_train.model.pack import Pack, Sight
from nvlm_train.model.zero_grads import PassedBy, zeros_for


@dataclass
class CrossSubmodules:
    """The chosen kernels bring these linears."""

    column: type
    row: type
    core: Callable[..., Tensor] | None = None
    """Attends to the context, with the arguments of `attend`, which it is where nothing else is chosen."""


class Gate(nn.Module):
    """The gate is tanh(alpha). alpha is 0 at the start, so the language model begins as it was (Flamingo)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.alpha = nn.Parameter(
            torch.zeros(1, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        # It multiplies sequence-sharded activations: its gradient is a sum over tensor-parallel ranks.
        self.alpha.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.alpha) * x


class GatedCrossAttention(PassedBy, MegatronModule):
    """It has the language model's heads and KV groups, no bias and no RoPE, and norms the context on entry.

    The arguments of `__init__` and `forward` are those that megatron-core's TransformerLayer passes.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: CrossSubmodules,
        layer_number: int,
        **unused: Any,
    ) -> None:
        super().__init__(config)
        # Every tensor-parallel rank holds the whole context: nothing on its side may gather a sequence.
        context_config = copy.copy(config)
        context_config.sequence_parallel = False
        groups, channels = config.num_query_groups, config.kv_channels
        assert groups is not None and channels is not None
        self._channels = channels
        width = config.num_attention_heads * channels
        self.linear_q = column_linear(config, submodules, width)
        self.context_norm = RMSNorm(context_config, config.hidden_size, config.layernorm_epsilon)
        self.linear_kv = column_linear(context_config, submodules, 2 * groups * channels)
        self.linear_proj = row_linear(config, submodules, width)
        self.gate = Gate(config)
        self._core = submodules.core

    def forward(
        self,
        hidden_SBH: Tensor,
        attention_mask: Sight,
        key_value_states: Tensor | None,
        inference_context: None = None,
    ) -> tuple[Tensor, None]:
        """Computes what is added to the residual stream, and no bias.

        Args:
            hidden_SBH: normed; this rank's part of the sequence under sequence parallelism.
            attention_mask: who sees what; megatron-core's name for it.
            key_value_states: the context [C, 1, H], whole; None when the pack has none.
            inference_context: unused.

        Returns:
            Like `hidden_SBH`; exactly zero at every token that sees nothing.
        """
        if key_value_states is None:
            return zeros_for(hidden_SBH, self), None
        query_SBH, _ = self.linear_q(hidden_SBH)
        states_CBH = self._keys_and_values(key_value_states)
        query_SND = query_SBH.view(len(query_SBH), -1, self._channels)
        states_CG2D = states_CBH.view(len(states_CBH), -1, 2, self._channels)
        key_CGD, value_CGD = states_CG2D.unbind(dim=2)
        dropout = self.config.attention_dropout if self.training else 0.0
        with drawing_for_heads(self.config, dropout):
            core = self._core or attend
            attended = core(query_SND, key_CGD, value_CGD, attention_mask, dropout)
        output_SBH, _ = self.linear_proj(attended.reshape(len(attended), 1, -1))
        return self.gate(output_SBH), None

    def _keys_and_values(self, context_CBH: Tensor) -> Tensor:
        """Projects the context. The normed context is wider than keys and values, so backward makes it again.

        megatron-core's checkpoint and not torch's, which detaches the weights, whose `main_grad` the
        linear looks for; it passes gradients to parameters only behind an input that wants one.
        """
        if not context_CBH.requires_grad:
            return self._project_context(context_CBH)
        states_CBH: Tensor = tensor_parallel.checkpoint(self._project_context, False, context_CBH)
        return states_CBH

    def _project_context(self, context_CBH: Tensor) -> Tensor:
        states_CBH, _ = self.linear_kv(self.context_norm(context_CBH))
        return states_CBH  # type: ignore[no-any-return]


def row_linear(config: TransformerConfig, submodules: CrossSubmodules, width: int) -> nn.Module:
    """Builds a linear without bias from `width` channels, sharded over TP ranks, to the hidden size."""
    return build_module(  # type: ignore[no-any-return]
        submodules.row,
        width,
        config.hidden_size,
        config=config,
        init_method=config.output_layer_init_method,
        bias=False,
        input_is_parallel=True,
        skip_bias_add=True,
        is_expert=False,
        tp_comm_buffer_name="cross_proj",
    )


def column_linear(config: TransformerConfig, submodules: CrossSubmodules, width: int) -> nn.Module:
    """Builds a linear without bias from the hidden size to `width` channels, sharded over TP ranks."""
    return build_module(  # type: ignore[no-any-return]
        submodules.column,
        config.hidden_size,
        width,
        config=config,
        init_method=config.init_method,
        gather_output=False,
        bias=False,
        skip_bias_add=False,
        is_expert=False,
        tp_comm_buffer_name="cross",
    )


def attend(
    query_SND: Tensor,
    key_CGD: Tensor,
    value_CGD: Tensor,
    sight: Sight,
    dropout: float = 0.0,
) -> Tensor:
    """Lets each span's tokens attend to its part of the context; the result is zero outside the spans.

    There is no mask and no score matrix, and keys and values are never copied: a span reads a view
    of them.

    Args:
        query_SND: [S, N, D].
        key_CGD: [C, G, D].
        value_CGD: [C, G, D].
        sight: its spans, ascending and disjoint in their tokens.
        dropout: probability, on attention weights.

    Returns:
        [S, N, D].
    """
    runs = tuple(runs_of(sight.spans))
    if dropout == 0.0 and not query_SND.is_cuda:
        return attend_spans(query_SND, key_CGD, value_CGD, runs)
    return compose_spans(query_SND, key_CGD, value_CGD, runs, dropout)


def compose_spans(
    query_SND: Tensor,
    key_CGD: Tensor,
    value_CGD: Tensor,
    runs: tuple[Run, ...],
    dropout: float = 0.0,
) -> Tensor:
    """Computes what `attend` does with one call of SDPA a run, composed by autograd."""
    parts: list[Tensor] = []
    end = 0
    for run in runs:
        parts.append(query_SND.new_zeros(run.start - end, *query_SND.shape[1:]))
        keys, values = (run.of_context(states) for states in (key_CGD, value_CGD))
        output = grouped_attention(run.of_tokens(query_SND), keys, values, dropout_p=dropout)
        parts.append(output.transpose(1, 2).flatten(0, 1))
        end = run.next_span.start
    parts.append(query_SND.new_zeros(len(query_SND) - end, *query_SND.shape[1:]))
    return torch.cat(parts)


class CrossLayer(TransformerLayer):
    """megatron-core's layer with cross-attention, which reads its spans where every layer knows its pack."""

    def _forward_attention(
        self,
        hidden_states: Tensor,
        packed_seq_params: Pack,
        context: Tensor | None = None,
        context_mask: None = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None]:
        outputs: tuple[Tensor, Tensor | None] = super()._forward_attention(
            hidden_states,
            packed_seq_params=packed_seq_params,
            context=context,
            context_mask=packed_seq_params.sight(),
            **others,
        )
        return outputs


class GatedFeedForwardLayer(CrossLayer):
    """The layer runs self-attention, gated cross-attention, a gated feed-forward and the feed-forward.

    A token that sees no tile passes both gates unchanged.
    """

    def __init__(
        self, config: TransformerConfig, submodules: TransformerLayerSubmodules, **place: Any
    ) -> None:
        super().__init__(config, submodules, **place)
        self.cross_feed_forward = GatedFeedForward(config, submodules.mlp.submodules)

    def _forward_attention(
        self,
        hidden_states: Tensor,
        packed_seq_params: Pack,
        context: Tensor | None = None,
        context_mask: None = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None]:
        hidden_SBH, _ = super()._forward_attention(
            hidden_states, packed_seq_params, context, **others
        )
        sees_S11 = None if context is None else self.sees(packed_seq_params)
        output_SBH = self.cross_feed_forward(hidden_SBH, sees_S11)
        # As behind every other branch: megatron-core's bias-dropout-add, without a bias.
        output_SBH = F.dropout(output_SBH, self.hidden_dropout, self.training)
        return hidden_SBH + output_SBH, context

    def sees(self, pack: Pack) -> Tensor:
        """Returns which of the rows that this layer's feed-forward gets see anything, fp32 [S, 1, 1]."""
        return pack.sees_S11


class GatedFeedForward(PassedBy, MegatronModule):
    """It is the language model's MLP once more, behind a norm and a gate."""

    def __init__(self, config: TransformerConfig, submodules: Any) -> None:
        super().__init__(config)
        self.norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.mlp = MLP(config, submodules)
        self.gate = Gate(config)

    def forward(self, hidden_SBH: Tensor, sees_S11: Tensor | None) -> Tensor:
        """Computes what is added to the residual stream: zero for rows that see nothing.

        Args:
            hidden_SBH: this rank's part of the sequence under sequence parallelism.
            sees_S11: 1 for rows of the whole sequence that see anything, 0 for others; None without a
                context.
        """
        if sees_S11 is None:
            return zeros_for(hidden_SBH, self)
        output_SBH = self._feed_forward(self.norm(hidden_SBH))
        sees_SBH = sees_S11.to(hidden_SBH.dtype)
        if self.config.sequence_parallel:
            sees_SBH = tensor_parallel.scatter_to_sequence_parallel_region(sees_SBH)
        return self.gate(output_SBH) * sees_SBH

    def _feed_forward(self, normed_SBH: Tensor) -> Tensor:
        """Runs the MLP; where the layer's own is made again in backward, this one is too."""
        if self.config.recompute_granularity != "selective" or "mlp" not in (
            self.config.recompute_modules or ()
        ):
            return self.mlp(normed_SBH)[0]  # type: ignore[no-any-return]
        output_SBH, _ = tensor_parallel.checkpoint(self.mlp, False, normed_SBH)
        return output_SBH  # type: ignore[no-any-return]
