"""The cross-attention context's way to later pipeline stages: behind the hidden states in one tensor.

megatron-core's schedule sends one tensor a microbatch and propagates the gradient of one. Joined on
the sequence axis, the context needs nothing of it but variable lengths, and its gradient comes back
by itself. Under sequence parallelism each rank sends its part.

Shape legend: S tokens, C context tokens, B batch (always 1), H hidden.
"""

from __future__ import annotations

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F


def join(config: TransformerConfig, hidden_SBH: Tensor, context_CBH: Tensor) -> Tensor:
    """Joins what a pipeline stage sends: [own S + own C, 1, H]."""
    if config.sequence_parallel:
        missing = -len(context_CBH) % config.tensor_model_parallel_size
        padded_CBH = F.pad(context_CBH, (0, 0, 0, 0, 0, missing))
        context_CBH = tensor_parallel.scatter_to_sequence_parallel_region(padded_CBH)
    return torch.cat([hidden_SBH, context_CBH])


def split(config: TransformerConfig, joined: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Splits what `join` made into own hidden states and the whole context of `length` tokens."""
    own = length
    if config.sequence_parallel:
        own = -(-length // config.tensor_model_parallel_size)
    hidden_SBH, context_CBH = joined.split([len(joined) - own, own])
    if config.sequence_parallel:
        # Its gradient is whole on every rank (the KV projections sum it): each takes its part.
        context_CBH = tensor_parallel.gather_from_sequence_parallel_region(
            context_CBH, tensor_parallel_output_grad=False
        )[:length]
    return hidden_SBH, context_CBH
