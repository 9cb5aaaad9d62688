"""What every layer knows of the pack that it computes: numbers of the host beside tensors of the device.

Shape legend: S tokens of a pack, L positions whose logits are wanted, D head size.
"""

from __future__ import annotations

import bisect
import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nvlm_train.device_batch import DevicePack, Spans
from nvlm_train.model.attention import intervals
from nvlm_train.model.attention.choice import Cores
from nvlm_train.model.attention.masks import Masks, masks_for_layers
from nvlm_train.model.attention.rope import Turns
from nvlm_train.parallel.transfer import send

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True)
class Sight:
    """What rows of a pack see of the context."""

    spans: Spans
    mask: BlockMask | None = None
    """The same, where one kernel attends for all spans."""


@dataclass(kw_only=True)
class Pack(PackedSeqParams):
    """megatron-core hands this to every layer, through recomputation too.

    With Transformer Engine the fields of `PackedSeqParams` are set, which its kernels read. Without it
    megatron-core would read `cu_seqlens_q` on the host, four times a layer, to turn queries and keys
    segment by segment: it is None, and attention turns them by `turns` and reads `lengths`, `cu_seqlens` or
    `masks`.
    """

    lengths: tuple[int, ...]
    """Tokens of each segment."""
    wanted: tuple[int, ...] = ()
    """Positions whose logits are wanted, on the last pipeline stage; ascending, the last one repeated up to
    a multiple of TP under sequence parallelism."""
    wanted_L: Tensor
    """The same, int64."""
    cu_seqlens: Tensor | None = None
    """int32 [segments + 1], as `cu_seqlens_q`, for torch's kernel."""
    turns: Turns | None = None
    """How far queries and keys turn; None where megatron-core turns them."""
    spans: Spans = ()
    """Who sees what of the context."""
    masks: Masks = field(default_factory=Masks)

    def sight(self) -> Sight:
        """Returns what all tokens see of the context."""
        return Sight(self.spans, self.masks.context)

    def sight_of_wanted(self) -> Sight:
        """Returns what the last layer's wanted rows see of it."""
        return Sight(spans_of_wanted(self.spans, self.wanted), self.masks.wanted_of_context)

    @functools.cached_property
    def sees_S11(self) -> Tensor:
        """fp32 [S, 1, 1]: 1 for a token that sees anything of the context, 0 for others."""
        (sees_S,) = send([intervals.of_spans(self.spans, sum(self.lengths), num_keys=0).sees_Q])
        return sees_S[:, None, None]

    @functools.cached_property
    def sees_of_wanted_L11(self) -> Tensor:
        """The same, of the last layer's wanted rows."""
        return self.sees_S11.index_select(0, self.wanted_L)


def pack_for_layers(
    config: TransformerConfig, pack: DevicePack, cores: Cores, turns: Turns | None = None
) -> Pack:
    """Makes what the layers get of a pack on the device."""
    filling = -len(pack.wanted) % config.tensor_model_parallel_size
    if not config.sequence_parallel:
        filling = 0
    wanted_L = pack.wanted_L
    if filling:
        wanted_L = torch.cat([wanted_L, wanted_L[-1:].expand(filling)])
    is_fused = cores.tokens == "transformer_engine"
    longest, wanted = max(pack.lengths), pack.wanted + pack.wanted[-1:] * filling
    return Pack(
        qkv_format="thd",
        cu_seqlens_q=pack.cu_seqlens if is_fused else None,
        cu_seqlens_kv=pack.cu_seqlens if is_fused else None,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        lengths=pack.lengths,
        wanted=wanted,
        wanted_L=wanted_L,
        cu_seqlens=pack.cu_seqlens,
        turns=turns,
        spans=pack.context.spans if pack.context else (),
        masks=masks_for_layers(cores, pack, wanted),
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
