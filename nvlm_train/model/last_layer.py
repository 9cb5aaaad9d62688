"""The decoder's last layer, of which most tokens need only keys and values.

Past them only positions whose logits are wanted go on: they ask, and the output projection,
cross-attention and MLP see them alone. Image and prompt tokens, most of a sequence, skip nearly a
layer of the language model, forward and backward. The loss and every gradient stay what they are.

Shape legend: S tokens of a pack, L wanted positions, H hidden, N local heads, G local KV groups, D
head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from nvlm_train.model.cross_attention import GatedFeedForwardLayer
from nvlm_train.model.layers import SdpaAttention, grouped_attention

_ROWS_AT_ONCE = 256
"""Asking positions that share a mask of [256, S]: 8 MiB at 8,192 tokens."""


@dataclass(kw_only=True)
class Pack(PackedSeqParams):
    """megatron-core hands this to every layer, through recomputation too; the last reads `wanted_L`."""

    wanted_L: Tensor
    """int64, ascending: positions whose logits are wanted, on the last pipeline stage."""


def wanted_positions(config: TransformerConfig, positions_L: Tensor) -> Tensor:
    """Returns ascending positions; under sequence parallelism the last is repeated up to a multiple of TP."""
    if not config.sequence_parallel:
        return positions_L
    filling = -len(positions_L) % config.tensor_model_parallel_size
    return torch.cat([positions_L, positions_L[-1:].expand(filling)])


def as_last(layer: ModuleSpec) -> ModuleSpec:
    """Turns the spec of a layer of block.py into that of the same layer as the model's last."""
    layer.module = {
        TransformerLayer: LastLayer,
        GatedFeedForwardLayer: LastGatedFeedForwardLayer,
    }[layer.module]
    attention = layer.submodules.self_attention.submodules
    if attention.core_attention is SdpaAttention:
        attention.core_attention = SdpaOfWanted
    else:
        attention.core_attention = _selecting(attention.core_attention)
    return layer


class LastLayer(TransformerLayer):
    """megatron-core's layer takes [S, 1, H] to [L, 1, H] here."""

    def forward(
        self, *args: Any, packed_seq_params: Pack, context_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        if context_mask is not None:
            context_mask = spans_of_wanted(context_mask, packed_seq_params.wanted_L)
        return super().forward(
            *args, packed_seq_params=packed_seq_params, context_mask=context_mask, **kwargs
        )

    def _forward_attention(
        self,
        hidden_states: Tensor,
        packed_seq_params: Pack,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        **unused: Any,
    ) -> tuple[Tensor, Tensor | None]:
        attended = self.self_attention(
            self.input_layernorm(hidden_states),
            attention_mask=None,
            rotary_pos_emb=rotary_pos_emb,
            packed_seq_params=packed_seq_params,
        )
        wanted_LBH = _at_positions(self.config, hidden_states, packed_seq_params.wanted_L)
        hidden_LBH = self._add(self.self_attn_bda, attended, wanted_LBH)
        crossed = self.cross_attention(
            self.pre_cross_attn_layernorm(hidden_LBH),
            attention_mask=context_mask,
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


class _SelectsWanted:
    """It is mixed into an attention that knows no positions: all tokens ask, and some answers are kept."""

    def forward(self, *args: Any, packed_seq_params: Pack, **kwargs: Any) -> Tensor:
        attended_SH = super().forward(*args, packed_seq_params=packed_seq_params, **kwargs)  # type: ignore[misc]
        return attended_SH.index_select(0, packed_seq_params.wanted_L)  # type: ignore[no-any-return]


def _selecting(attention: type) -> type:
    """Makes a subclass of another library's attention that keeps the wanted rows."""

    class OfWanted(_SelectsWanted, attention):  # type: ignore[misc]
        """All tokens ask, and the wanted rows are kept."""

    return OfWanted


class SdpaOfWanted(SdpaAttention):
    """`SdpaAttention` computes only the wanted rows here."""

    def attend(
        self, query_NSD: Tensor, key_GSD: Tensor, value_GSD: Tensor, packed: PackedSeqParams
    ) -> Tensor:
        """Computes attention of the wanted rows, [N, L, D]."""
        assert isinstance(packed, Pack)
        bounds = packed.cu_seqlens_q.long()
        counts = torch.searchsorted(packed.wanted_L, bounds).diff().tolist()
        segments = zip(
            packed.wanted_L.split(counts),
            bounds.tolist(),
            self.segments(query_NSD, key_GSD, value_GSD, packed),
            strict=False,
        )
        outputs = [self._of_segment(*states, wanted - start) for wanted, start, states in segments]
        return torch.cat(outputs, dim=1)

    def _of_segment(
        self, query_NSD: Tensor, key_GSD: Tensor, value_GSD: Tensor, wanted_L: Tensor
    ) -> Tensor:
        # With most rows wanted the causal kernel is faster; on GPUs a mask would cost it.
        if 2 * len(wanted_L) > query_NSD.shape[1] or query_NSD.is_cuda:
            return self.causal(query_NSD, key_GSD, value_GSD).index_select(1, wanted_L)
        outputs = [query_NSD[:, :0]]
        for rows in wanted_L.split(_ROWS_AT_ONCE) if len(wanted_L) else ():
            stop = int(rows[-1]) + 1
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


def spans_of_wanted(spans: Tensor, wanted_L: Tensor) -> Tensor:
    """Turns spans (start, stop, first, last) of tokens into spans of wanted rows.

    A span in which nothing is wanted stays, with no rows: its keys and values then have gradients, of
    zeros.
    """
    rows = torch.searchsorted(wanted_L.to(spans.device), spans[:, :2].long().contiguous())
    return torch.cat([rows.to(spans.dtype), spans[:, 2:]], dim=1)


def _at_positions(config: TransformerConfig, hidden_SBH: Tensor, wanted_L: Tensor) -> Tensor:
    """Selects the rows, [L, 1, H]; under sequence parallelism this rank's part of them."""
    if not config.sequence_parallel:
        return hidden_SBH.index_select(0, wanted_L)
    # The scatter's backward gives every rank the whole gradient; the gather's must not sum it again.
    whole_SBH = tensor_parallel.gather_from_sequence_parallel_region(
        hidden_SBH, tensor_parallel_output_grad=False
    )
    return tensor_parallel.scatter_to_sequence_parallel_region(whole_SBH.index_select(0, wanted_L))
