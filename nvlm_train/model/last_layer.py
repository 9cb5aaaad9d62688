"""The decoder's last layer, of which most tokens need only keys and values.

Past them only positions whose logits are wanted go on: they ask, and the output projection,
cross-attention and MLP see them alone. Image and prompt tokens, most of a sequence, skip nearly a
layer of the language model, forward and backward. The loss and every gradient stay what they are.

Shape legend: S tokens of a pack, L wanted positions, H hidden, N local heads, G local KV groups, D
head size.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from nvlm_train.model.cross_attention import CrossLayer, GatedFeedForwardLayer
from nvlm_train.model.layers import SdpaAttention, grouped_attention
from nvlm_train.model.pack import Pack

ROWS_AT_ONCE = 256
"""Asking positions that share a mask of [256, S]: 8 MiB at 8,192 tokens."""


def as_last(layer: ModuleSpec, attention: type) -> ModuleSpec:
    """Turns the spec of a layer of block.py into that of the same layer as the model's last.

    Args:
        layer: the spec.
        attention: of the wanted rows.
    """
    layer.module = {
        TransformerLayer: LastLayer,
        CrossLayer: LastLayer,
        GatedFeedForwardLayer: LastGatedFeedForwardLayer,
    }[layer.module]
    layer.submodules.self_attention.submodules.core_attention = attention
    return layer


class LastLayer(TransformerLayer):
    """megatron-core's layer takes [S, 1, H] to [L, 1, H] here."""

    def _forward_attention(
        self,
        hidden_states: Tensor,
        packed_seq_params: Pack,
        context: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None]:
        attended = self.self_attention(
            self.input_layernorm(hidden_states),
            attention_mask=None,
            rotary_pos_emb=others["rotary_pos_emb"],
            packed_seq_params=packed_seq_params,
        )
        wanted_LBH = _at_positions(self.config, hidden_states, packed_seq_params.wanted_L)
        hidden_LBH = self._add(self.self_attn_bda, attended, wanted_LBH)
        crossed = self.cross_attention(
            self.pre_cross_attn_layernorm(hidden_LBH),
            attention_mask=packed_seq_params.sight_of_wanted(),
            key_value_states=context,
            inference_context=None,
        )
        return self._add(self.cross_attn_bda, crossed, hidden_LBH), context

    def _add(self, bias_dropout_add: Callable[..., Any], output: Any, residual: Tensor) -> Tensor:
        add = bias_dropout_add(self.training, self.config.bias_dropout_fusion)
        with self.bias_dropout_add_exec_handler():
            return add(output, residual, self.hidden_dropout)  # type: ignore[no-any-return]


class LastGatedFeedForwardLayer(GatedFeedForwardLayer, LastLayer):
    """The last layer may have cross-attention with its gated feed-forward."""

    def sees(self, pack: Pack) -> Tensor:
        return pack.sees_of_wanted_L11


class _SelectsWanted:
    """It is mixed into an attention that knows no positions: all tokens ask, and some answers are kept."""

    def forward(self, *args: Any, packed_seq_params: Pack, **kwargs: Any) -> Tensor:
        attended_SH = super().forward(*args, packed_seq_params=packed_seq_params, **kwargs)  # type: ignore[misc]
        return attended_SH.index_select(0, packed_seq_params.wanted_L)  # type: ignore[no-any-return]


def selecting(attention: type) -> type:
    """Makes a subclass of another library's attention that keeps the wanted rows."""

    class OfWanted(_SelectsWanted, attention):  # type: ignore[misc]
        """All tokens ask, and the wanted rows are kept."""

    return OfWanted


class SdpaOfWanted(SdpaAttention):
    """`SdpaAttention` computes only the wanted rows here."""

    def attend(self, query_SND: Tensor, key_SGD: Tensor, value_SGD: Tensor, packed: Pack) -> Tensor:
        """Computes attention of the wanted rows, [L, N, D]."""
        bounds = list(accumulate(packed.lengths, initial=0))
        edges = [bisect.bisect_left(packed.wanted, bound) for bound in bounds]
        counts = [last - first for first, last in pairwise(edges)]
        segments = zip(
            packed.wanted_L.split(counts),
            pairwise(edges),
            bounds,
            self.segments(query_SND, key_SGD, value_SGD, packed),
            strict=False,
        )
        outputs = [
            self._of_segment(*states, wanted_L - start, [row - start for row in packed.wanted[a:b]])
            for wanted_L, (a, b), start, states in segments
        ]
        return torch.cat(outputs, dim=1).transpose(0, 1)

    def _of_segment(
        self,
        query_NSD: Tensor,
        key_GSD: Tensor,
        value_GSD: Tensor,
        wanted_L: Tensor,
        wanted: list[int],
    ) -> Tensor:
        # With most rows wanted the causal kernel is faster; on GPUs a mask would cost it.
        if 2 * len(wanted) > query_NSD.shape[1] or query_NSD.is_cuda:
            return self.causal(query_NSD, key_GSD, value_GSD).index_select(1, wanted_L)
        outputs = [query_NSD[:, :0]]
        for first in range(0, len(wanted), ROWS_AT_ONCE):
            rows = wanted_L[first : first + ROWS_AT_ONCE]
            stop = wanted[first : first + ROWS_AT_ONCE][-1] + 1
            output = grouped_attention(
                query_NSD.index_select(1, rows)[None],
                key_GSD[None, :, :stop],
                value_GSD[None, :, :stop],
                attn_mask=torch.arange(stop) <= rows[:, None],
                scale=self.scale,
                dropout_p=self.dropout_now,
            )
            outputs.append(output[0])
        return torch.cat(outputs, dim=1)


def _at_positions(config: TransformerConfig, hidden_SBH: Tensor, wanted_L: Tensor) -> Tensor:
    """Selects the rows, [L, 1, H]; under sequence parallelism this rank's part of them."""
    if not config.sequence_parallel:
        return hidden_SBH.index_select(0, wanted_L)
    # The scatter's backward gives every rank the whole gradient; the gather's must not sum it again.
    whole_SBH = tensor_parallel.gather_from_sequence_parallel_region(
        hidden_SBH, tensor_parallel_output_grad=False
    )
    return tensor_parallel.scatter_to_sequence_parallel_region(whole_SBH.index_select(0, wanted_L))
