"""The parts of a decoder layer that megatron-core's torch-only path lacks, and the layer's spec.

Shape legend: S tokens of a pack, N local heads, G local KV groups, D head size, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from nvlm_train.model.attention.rope import turn
from nvlm_train.model.pack import Pack
from nvlm_train.parallel import cpu_kernels
from nvlm_train.parallel.kernels import Kernels


class RMSNorm(nn.Module):
    """The norm may run on sequence-sharded activations.

    The mark tells megatron-core to sum the weight's gradient over tensor-parallel ranks;
    its own `WrappedTorchNorm` refuses sequence parallelism.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        weight = torch.ones(
            hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device()
        )
        self.weight = nn.Parameter(weight)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda or x.dtype == torch.bfloat16:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return cpu_kernels.rms_norm(x, self.weight, self.eps)


class PackAttention(nn.Module):
    """Turns queries and keys by their positions, then attends within each sample of a pack.

    Stands in for megatron-core's DotProductAttention, which materialises S x S scores and refuses
    packed sequences. The arguments of `__init__` and `forward` are those megatron-core passes.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **unused: Any,
    ) -> None:
        super().__init__()
        self.config = config
        self.scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query_SND: Tensor,
        key_SGD: Tensor,
        value_SGD: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: Pack | None = None,
        **unused: Any,
    ) -> Tensor:
        """Attends within each segment of `packed_seq_params.lengths`.

        Returns:
            [S, N * D].
        """
        assert packed_seq_params is not None, "NVLM always runs packed sequences"
        if packed_seq_params.turns is not None:
            query_SND, key_SGD = turn(query_SND, key_SGD, packed_seq_params.turns)
        with drawing_for_heads(self.config, self.dropout_now):
            return self.attend(query_SND, key_SGD, value_SGD, packed_seq_params).flatten(1)

    @property
    def dropout_now(self) -> float:
        """The probability of dropout on attention weights is zero outside training."""
        return self.dropout if self.training else 0.0

    def attend(self, query_SND: Tensor, key_SGD: Tensor, value_SGD: Tensor, packed: Pack) -> Tensor:
        """Computes attention within segments, [S, N, D]; the last layer's, [L, N, D]."""
        raise NotImplementedError


class SdpaAttention(PackAttention):
    """One call of torch's SDPA a segment: no score matrix, no look across samples. The fastest on a CPU."""

    def attend(self, query_SND: Tensor, key_SGD: Tensor, value_SGD: Tensor, packed: Pack) -> Tensor:
        """Computes attention of all tokens within their segments, [S, N, D]."""
        segments = self.segments(query_SND, key_SGD, value_SGD, packed)
        return torch.cat([self.causal(*states) for states in segments], dim=1).transpose(0, 1)

    def segments(
        self, query_SND: Tensor, key_SGD: Tensor, value_SGD: Tensor, packed: Pack
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yields views of each segment's queries, keys and values, heads first."""
        states = (state.transpose(0, 1) for state in (query_SND, key_SGD, value_SGD))
        return zip(*(state.split(packed.lengths, dim=1) for state in states), strict=True)

    def causal(self, query_NSD: Tensor, key_GSD: Tensor, value_GSD: Tensor) -> Tensor:
        """Computes causal attention within one segment, [N, S, D]."""
        return grouped_attention(
            query_NSD[None],
            key_GSD[None],
            value_GSD[None],
            is_causal=True,
            scale=self.scale,
            dropout_p=self.dropout_now,
        )[0]


def grouped_attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """Computes SDPA over grouped KV heads with a kernel that stores no scores.

    Args:
        query: [batch, query heads, queries, D].
        key: [batch, KV groups, keys, D].
        value: like `key`.
        options: SDPA's own.

    Returns:
        Like `query`.
    """
    if query.is_cuda and query.dtype == torch.float32:
        # CUDA's only such kernel for fp32 knows no groups.
        group = query.shape[1] // key.shape[1]
        key, value = (states.repeat_interleave(group, dim=1) for states in (key, value))
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=True, **options)


def drawing_for_heads(
    config: TransformerConfig, probability: float
) -> AbstractContextManager[None]:
    """Surrounds dropout of attention weights, whose heads are sharded over tensor-parallel ranks.

    Megatron's rules say which generator a mask comes from. What every rank holds whole (the residual
    stream without sequence parallelism, word embeddings, the context) is dropped by the default
    generator, which is in the same state on all tensor-parallel ranks: they need one mask. What is
    sharded (heads, parts of a sequence) is dropped by the one that megatron-core's tracker keeps, which
    is another on each. parallel/topology.py seeds both.

    As in megatron-core's DotProductAttention: under sequence parallelism its TransformerBlock has turned
    to the tracker's generator for all that a layer draws. To fork once more would do no harm forward, but
    recomputation in backward, outside the block, would then start from an older state and draw other masks.

    Args:
        config: of the decoder that this attention is part of.
        probability: of dropout; with 0 nothing is drawn, and no generator is touched.
    """
    if probability == 0.0 or config.sequence_parallel:
        return nullcontext()
    fork: AbstractContextManager[None] = tensor_parallel.get_cuda_rng_tracker().fork()
    return fork


def mlp_spec(kernels: Kernels) -> ModuleSpec:
    """Describes megatron-core's tensor-parallel MLP on the chosen linears."""
    _, column, row = implementations(kernels)
    return ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row))


def mask_type(kernels: Kernels) -> AttnMaskType:
    packed = kernels.attention == "transformer_engine"
    return AttnMaskType.padding_causal if packed else AttnMaskType.causal


def implementations(kernels: Kernels) -> tuple[type, type, type]:
    """Returns norm, column- and row-parallel linear."""
    if kernels.linear == "megatron":
        return RMSNorm, ColumnParallelLinear, RowParallelLinear
    from megatron.core.extensions import transformer_engine as te

    norm = te.TENorm if kernels.norm == "transformer_engine" else RMSNorm
    return norm, te.TEColumnParallelLinear, te.TERowParallelLinear
