"""Self-attention and RoPE over a pack, in the ways there are.

Shape legend: S tokens of a pack, N query heads, G KV groups, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from benchmarks.gpu.packs import encode, make_plan, pack, segment_lengths
from benchmarks.gpu.shapes import Sizes
from benchmarks.gpu_parts.variants import (
    Row,
    Timing,
    Variant,
    compare,
    in_fp32,
    random,
    with_gradients,
)
from nvlm_train.model.attention import intervals
from nvlm_train.model.attention.masks import Masks, block_mask, mask_arrays
from nvlm_train.model.attention.packed import FlexAttention, VarlenAttention
from nvlm_train.model.attention.rope import Turns, turn
from nvlm_train.model.layers import PackAttention, SdpaAttention
from nvlm_train.model.pack import Pack
from nvlm_train.parallel.topology import device
from nvlm_train.parallel.transfer import send


@dataclass(frozen=True)
class Segments:
    """Where a pack's samples begin, on the host and on the device."""

    lengths: tuple[int, ...]
    cu_seqlens: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Segments:
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        return cls(tuple(lengths), bounds.to(device()))

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def total(self) -> int:
        return sum(self.lengths)

    def packed(self) -> Pack:
        return Pack(
            qkv_format="thd",
            lengths=self.lengths,
            wanted_L=self.cu_seqlens.new_empty(0).long(),
            cu_seqlens_q=self.cu_seqlens,
            cu_seqlens_kv=self.cu_seqlens,
            cu_seqlens=self.cu_seqlens,
            max_seqlen_q=self.longest,
            max_seqlen_kv=self.longest,
        )


def plan_segments(sizes: Sizes) -> Segments:
    """Of the first pack of D in the benchmarks' plan."""
    first, *_ = pack(encode("d", sizes, make_plan(sizes)), sizes.pack_length)
    return Segments.of(segment_lengths(first))


# ---- RoPE ----


def rope_rows(sizes: Sizes, config: TransformerConfig, timing: Timing) -> list[Row]:
    """Queries and keys of one layer, forward and backward; angles of the pack are made before."""
    segments = plan_segments(sizes)
    channels = config.kv_channels
    query = random(segments.total, config.num_attention_heads, channels)
    key = random(segments.total, config.num_query_groups, channels)
    output_gradient = random(query.numel() + key.numel()).detach()
    rotary = RotaryEmbedding(channels, rotary_percent=1.0, rotary_base=1e6)
    angles = rotary(sizes.pack_length + 1, packed_seq=True)
    positions = torch.cat([torch.arange(length) for length in segments.lengths]).to(device())
    turns = angles[:, 0][positions]

    def both(rotate: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda q, k: torch.cat([rotate(q).flatten(), rotate(k).flatten()])

    def by_megatron(own: TransformerConfig) -> Callable[[Tensor], Tensor]:
        return lambda states: apply_rotary_pos_emb(states, angles, own, segments.cu_seqlens)

    def by_gather(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        cos, sin = turns.cos().to(dtype), turns.sin().to(dtype)
        return lambda states: rotate_pack(states, cos, sin)

    def compiled() -> Callable[[Tensor], Tensor]:
        cos, sin = turns.cos().bfloat16(), turns.sin().bfloat16()
        function = torch.compile(rotate_pack, dynamic=False)
        return lambda states: function(states, cos, sin)

    def as_trained() -> Variant:
        by = Turns.of(turns[..., : channels // 2], torch.bfloat16)

        def function(q: Tensor, k: Tensor) -> Tensor:
            return torch.cat([each.flatten() for each in turn(q, k, by)])

        return Variant(
            "as_trained", lambda: with_gradients(function, (query, key), output_gradient), False
        )

    def variant(name: str, make: Callable[[], Callable[[Tensor], Tensor]], cuda: bool) -> Variant:
        def prepare():  # type: ignore[no-untyped-def]
            return with_gradients(both(make()), (query, key), output_gradient)

        return Variant(name, prepare, cuda)

    fused = replace(config)
    fused.apply_rope_fusion = True
    return compare(
        "rope",
        in_fp32(both(by_gather(torch.float32)), (query, key), output_gradient),
        [
            variant("megatron_by_segment", lambda: by_megatron(config), False),
            variant("gathered", lambda: by_gather(torch.bfloat16), False),
            variant("gathered_compiled", compiled, True),
            variant("transformer_engine", lambda: by_megatron(fused), True),
            as_trained(),
        ],
        timing,
    )


def rotate_pack(states_SND: Tensor, cos_S1D: Tensor, sin_S1D: Tensor) -> Tensor:
    """RoPE of a whole pack, with the cosine and sine of every token's position in its sample."""
    first, second = states_SND.chunk(2, dim=-1)
    turned_SND = torch.cat((-second, first), dim=-1)
    return states_SND * cos_S1D + turned_SND * sin_S1D


# ---- self-attention ----


def attention_rows(sizes: Sizes, config: TransformerConfig, timing: Timing) -> list[Row]:
    """Causal attention within each sample of a pack, forward and backward."""
    segments = plan_segments(sizes)
    channels = config.kv_channels
    inputs = (
        random(segments.total, config.num_attention_heads, channels),
        random(segments.total, config.num_query_groups, channels),
        random(segments.total, config.num_query_groups, channels),
    )
    output_gradient = random(segments.total, config.num_attention_heads * channels).detach()
    makers: list[tuple[str, Callable[[], Callable[..., Tensor]], bool]] = [
        ("sdpa_by_segment", lambda: _by_segment(config, segments), False),
        ("varlen", lambda: _varlen(segments, group=1), True),
        ("varlen_as_trained", lambda: _module(VarlenAttention, config, segments), True),
        ("flex_as_trained", lambda: _module(FlexAttention, config, segments), True),
        ("varlen_repeated_kv", lambda: _varlen(segments, group_size(config)), True),
        ("flex_compiled", lambda: _flex(segments), True),
        ("transformer_engine", lambda: _engine(config, segments), True),
    ]

    def variant(name: str, make: Callable[[], Callable[..., Tensor]], cuda: bool) -> Variant:
        return Variant(name, lambda: with_gradients(make(), inputs, output_gradient), cuda)

    reference = in_fp32(_by_segment(config, segments), inputs, output_gradient)
    return compare("attention", reference, [variant(*maker) for maker in makers], timing)


def group_size(config: TransformerConfig) -> int:
    return config.num_attention_heads // config.num_query_groups


def _by_segment(config: TransformerConfig, segments: Segments) -> Callable[..., Tensor]:
    """One call a segment, as on a CPU, and where weights are dropped."""
    return _module(SdpaAttention, config, segments)


def _module(
    kind: type[PackAttention], config: TransformerConfig, segments: Segments
) -> Callable[..., Tensor]:
    """As training runs it, without RoPE."""
    module = kind(config, 1, AttnMaskType.causal, "self")
    own = intervals.of_segments(segments.lengths)
    packed = replace(
        segments.packed(), masks=Masks(tokens=block_mask(own, iter(send(mask_arrays(own)))))
    )
    return lambda query, key, value: module(query, key, value, None, packed_seq_params=packed)


def _varlen(segments: Segments, group: int) -> Callable[..., Tensor]:
    from torch.nn.attention.varlen import varlen_attn

    bounds, longest = segments.cu_seqlens, segments.longest

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if group > 1:
            key, value = (states.repeat_interleave(group, dim=1) for states in (key, value))
        return varlen_attn(query, key, value, bounds, bounds, longest, longest, window_size=(-1, 0))  # type: ignore[return-value]

    return function


def _flex(segments: Segments) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    numbers = torch.arange(len(segments.lengths)).repeat_interleave(torch.tensor(segments.lengths))
    sample = numbers.to(device())

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (sample[query] == sample[key])

    mask = create_block_mask(sees, None, None, segments.total, segments.total, device())
    compiled = torch.compile(flex_attention, dynamic=False)

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        states = [each.transpose(0, 1)[None] for each in (query, key, value)]
        return compiled(*states, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return function


def _engine(config: TransformerConfig, segments: Segments) -> Callable[..., Tensor]:
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    module = TEDotProductAttention(config, 1, AttnMaskType.padding_causal, "self")
    packed = segments.packed()

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return module(
            query, key, value, None, AttnMaskType.padding_causal, packed_seq_params=packed
        )

    return function
