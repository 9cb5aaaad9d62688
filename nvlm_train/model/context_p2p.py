"""The cross-attention context's way to later pipeline stages: behind the hidden states in one tensor.

megatron-core's schedule sends one tensor a microbatch and propagates the gradient of one. Joined on
the sequence axis, the context needs nothing of it, and its gradient comes back by itself. All packs of a
round send as many rows as its longest context has: with lengths of their own, stages would exchange the
shape of every transfer first, and the host would wait for it. Under sequence parallelism each rank sends
its part.

Shape legend: S tokens, C context tokens, B batch (always 1), H hidden.
"""

from __future__ import annotations

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F

from nvlm_train.device_batch import DeviceContext


def join(
    config: TransformerConfig, hidden_SBH: Tensor, context_CBH: Tensor | None, relayed: int
) -> Tensor:
    """Joins what a pipeline stage sends: [own S + own relayed, 1, H].

    Args:
        config: of the decoder.
        hidden_SBH: this rank's part under sequence parallelism.
        context_CBH: whole; None when the pack has none, and rows of zeros are sent.
        relayed: rows of context that every pack of the round sends, a multiple of TP.
    """
    if relayed == 0:
        return hidden_SBH
    if context_CBH is None:
        context_CBH = hidden_SBH.new_zeros(0, *hidden_SBH.shape[1:])
    filled_CBH = F.pad(context_CBH, (0, 0, 0, 0, 0, relayed - len(context_CBH)))
    if config.sequence_parallel:
        filled_CBH = tensor_parallel.scatter_to_sequence_parallel_region(filled_CBH)
    return torch.cat([hidden_SBH, filled_CBH])


def split(
    config: TransformerConfig, joined: Tensor, context: DeviceContext | None, relayed: int
) -> tuple[Tensor, Tensor | None]:
    """Splits what `join` made into own hidden states and the whole context of this pack, if it has one."""
    own = relayed // config.tensor_model_parallel_size if config.sequence_parallel else relayed
    hidden_SBH, filled_CBH = joined.split([len(joined) - own, own])
    if context is None:
        return hidden_SBH, None
    if config.sequence_parallel:
        # Its gradient is whole on every rank (the KV projections sum it): each takes its part.
        filled_CBH = tensor_parallel.gather_from_sequence_parallel_region(
            filled_CBH, tensor_parallel_output_grad=False
        )
    return hidden_SBH, filled_CBH[: context.length]
