"""What every layer knows of the pack that it computes: numbers of the host beside tensors of the device.

Shape legend: S tokens of a pack, L positions whose logits are wanted, D head size.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, replace

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nvlm_train.device_batch import DevicePack, Spans
from nvlm_train.parallel.kernels import Kernels


@dataclass(kw_only=True)
class Pack(PackedSeqParams):
    """megatron-core hands this to every layer, through recomputation too.

    With Transformer Engine the fields of `PackedSeqParams` are set, which its kernels read. Without it
    megatron-core would read `cu_seqlens_q` on the host, four times a layer, to turn queries and keys
    segment by segment: it is None, angles come by position, and attention reads `lengths`.
    """

    lengths: tuple[int, ...]
    """Tokens of each segment."""
    wanted: tuple[int, ...] = ()
    """Positions whose logits are wanted, on the last pipeline stage; ascending, the last one repeated up to
    a multiple of TP under sequence parallelism."""
    wanted_L: Tensor
    """The same, int64."""
    spans: Spans = ()
    """Who sees what of the context."""

    def of_wanted(self) -> Pack:
        """Returns the pack as the last layer's cross-attention sees it: only wanted rows ask."""
        return replace(self, spans=spans_of_wanted(self.spans, self.wanted))


def pack_for_layers(config: TransformerConfig, pack: DevicePack, kernels: Kernels) -> Pack:
    """Makes what the layers get of a pack on the device."""
    filling = -len(pack.wanted) % config.tensor_model_parallel_size
    if not config.sequence_parallel:
        filling = 0
    wanted_L = pack.wanted_L
    if filling:
        wanted_L = torch.cat([wanted_L, wanted_L[-1:].expand(filling)])
    is_fused = kernels.attention == "transformer_engine"
    longest = max(pack.lengths)
    return Pack(
        qkv_format="thd",
        cu_seqlens_q=pack.cu_seqlens if is_fused else None,
        cu_seqlens_kv=pack.cu_seqlens if is_fused else None,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        lengths=pack.lengths,
        wanted=pack.wanted + pack.wanted[-1:] * filling,
        wanted_L=wanted_L,
        spans=pack.context.spans if pack.context else (),
    )


def spans_of_wanted(spans: Spans, wanted: tuple[int, ...]) -> Spans:
    """Turns spans of tokens into spans of wanted rows.

    A span in which nothing is wanted stays, with no rows: its keys and values then have gradients, of
    zeros.
    """
    return tuple(
        span._replace(
            start=bisect.bisect_left(wanted, span.start), stop=bisect.bisect_left(wanted, span.stop)
        )
        for span in spans
    )
