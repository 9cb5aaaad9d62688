"""The decoder's last layer: past its attention, only positions whose logits are wanted go on.

Other tokens need the last layer for the keys and values that the wanted ones read, and for nothing
more. Image and prompt tokens, most of a sequence, thus skip one MLP of the language model, forward
and backward; the loss and every gradient stay what they are.

Shape legend: S tokens of a pack, L positions whose logits are wanted, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.nn import functional as F

from nvlm_train.model.cross_layer import GatedFeedForwardLayer


@dataclass
class Pack(PackedSeqParams):
    """What megatron-core hands to every layer, through activation recomputation too, and one thing more."""

    logit_positions_L: Tensor | None = None
    """int64 [L]; on the last pipeline stage."""


class _SelectsPositions:
    """Mixed into a layer: its MLP gets the wanted positions only, and so does all that follows."""

    def _forward_attention(
        self, *args: Any, packed_seq_params: Pack, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        hidden_SBH, context = super()._forward_attention(  # type: ignore[misc]
            *args, packed_seq_params=packed_seq_params, **kwargs
        )
        assert packed_seq_params.logit_positions_L is not None
        positions_L = packed_seq_params.logit_positions_L
        return _at_positions(self.config, hidden_SBH, positions_L), context  # type: ignore[attr-defined]


class LastLayer(_SelectsPositions, TransformerLayer):
    """megatron-core's layer, [S, 1, H] to [L, 1, H]."""


class LastGatedFeedForwardLayer(_SelectsPositions, GatedFeedForwardLayer):
    """The same with cross-attention and its gated feed-forward, which still see all tokens."""


LAST: dict[type, type] = {
    TransformerLayer: LastLayer,
    GatedFeedForwardLayer: LastGatedFeedForwardLayer,
}
"""A layer's class -> the class that it has as the model's last."""


def _at_positions(config: TransformerConfig, hidden_SBH: Tensor, positions_L: Tensor) -> Tensor:
    """The rows, [L, 1, H]; under sequence parallelism this rank's of them, filled up to a multiple of TP."""
    if not config.sequence_parallel:
        return hidden_SBH.index_select(0, positions_L)
    # The scatter's backward gives every rank the whole gradient; the gather's must not sum it again.
    whole_SBH = tensor_parallel.gather_from_sequence_parallel_region(
        hidden_SBH, tensor_parallel_output_grad=False
    )
    filling = -len(positions_L) % config.tensor_model_parallel_size
    rows_LBH = whole_SBH.index_select(0, F.pad(positions_L, (0, filling)))
    return tensor_parallel.scatter_to_sequence_parallel_region(rows_LBH)
