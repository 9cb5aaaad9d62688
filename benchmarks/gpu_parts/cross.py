"""Cross-attention of a pack's tokens over their parts of its context, in the ways there are.

Shape legend: S tokens of a pack, C tokens of its context, N query heads, G KV groups, R query heads
of a group, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from benchmarks.gpu.packs import encode, make_plan, pack
from benchmarks.gpu.shapes import Sizes
from benchmarks.gpu_parts.attention import group_size
from benchmarks.gpu_parts.variants import (
    Row,
    Timing,
    Variant,
    compare,
    in_fp32,
    random,
    with_gradients,
)
from nvlm_train.batch import Microbatch
from nvlm_train.device_batch import Span, Spans
from nvlm_train.model.attention import intervals
from nvlm_train.model.attention.masks import block_mask, mask_arrays
from nvlm_train.model.attention.packed import attend_context
from nvlm_train.model.cross_attention import attend
from nvlm_train.model.pack import Sight
from nvlm_train.parallel.topology import device
from nvlm_train.parallel.transfer import send


def cross_rows(sizes: Sizes, config: TransformerConfig, timing: Timing) -> list[Row]:
    """Each span of tokens sees its part of the context: the first pack of X in the plan."""
    microbatch, *_ = pack(encode("x", sizes, make_plan(sizes)), sizes.pack_length)
    assert microbatch.context is not None, "a pack of X has a context"
    spans = tuple(Span(*row) for row in microbatch.context.spans.tolist())
    groups, channels = config.num_query_groups, config.kv_channels
    context = microbatch.context.length
    inputs = (
        random(sizes.pack_length, groups * group_size(config), channels),
        random(context, groups, channels),
        random(context, groups, channels),
    )
    output_gradient = random(*inputs[0].shape).detach()

    def today(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(query, key, value, Sight(spans))

    makers: list[tuple[str, Callable[[], Callable[..., Tensor]], bool]] = [
        ("sdpa_by_span", lambda: today, False),
        ("varlen_gathered_kv", lambda: _gathered(microbatch), True),
        ("varlen_disjoint_calls", lambda: _disjoint(microbatch), True),
        ("flex_compiled", lambda: _flex_spans(microbatch), True),
        ("flex_as_trained", lambda: _as_trained(spans, sizes.pack_length, context), True),
        (
            "transformer_engine_gathered_kv",
            lambda: _gathered_te(config, microbatch),
            True,
        ),
    ]

    def variant(name: str, make: Callable[[], Callable[..., Tensor]], cuda: bool) -> Variant:
        return Variant(name, lambda: with_gradients(make(), inputs, output_gradient), cuda)

    reference = in_fp32(today, inputs, output_gradient)
    rows = compare("cross_attention", reference, [variant(*maker) for maker in makers], timing)
    shape = {
        "spans": len(spans),
        "context": context,
        "calls_disjoint": len(disjoint_sets(_spans(microbatch))),
    }
    return [row | shape for row in rows]


def _spans(microbatch: Microbatch) -> list[Span]:
    assert microbatch.context is not None
    return [Span(*row) for row in microbatch.context.spans.tolist()]


def _as_trained(spans: Spans, tokens: int, context: int) -> Callable[..., Tensor]:
    seen = intervals.of_spans(spans, tokens, context)
    sight = Sight(spans, block_mask(seen, iter(send(mask_arrays(seen)))))
    return lambda query, key, value: attend_context(query, key, value, sight)


def disjoint_sets(spans: Sequence[Span]) -> list[list[Span]]:
    """Spans in as few sets as a greedy walk finds, so that in each the context parts ascend apart.

    >>> disjoint_sets([(0, 1, 0, 4), (1, 2, 4, 8), (2, 9, 0, 8)])
    [[(0, 1, 0, 4), (1, 2, 4, 8)], [(2, 9, 0, 8)]]
    """
    sets: list[list[Span]] = []
    for span in spans:
        place = next((each for each in sets if each[-1][3] <= span[2]), None)
        if place is None:
            sets.append([span])
        else:
            place.append(span)
    return sets


@dataclass(frozen=True)
class Ragged:
    """Rows of queries and of keys, and the segments that they make."""

    rows: Tensor
    bounds_q: Tensor
    bounds_k: Tensor
    longest_q: int
    longest_k: int

    @classmethod
    def of(cls, spans: Sequence[Span], context: int) -> Ragged:
        """For keys in place: parts of the context that no span of the set sees get no queries."""
        rows, asking, seen, end = [], [], [], 0
        for start, stop, first, last in spans:
            if first > end:
                asking.append(0)
                seen.append(first - end)
            asking.append(stop - start)
            seen.append(last - first)
            rows.append(torch.arange(start, stop))
            end = last
        if end < context:
            asking.append(0)
            seen.append(context - end)
        return cls.from_counts(torch.cat(rows), asking, seen)

    @classmethod
    def gathered(cls, spans: Sequence[Span]) -> Ragged:
        """For keys that are copied span by span."""
        rows = torch.cat([torch.arange(start, stop) for start, stop, *_ in spans])
        asking = [stop - start for start, stop, *_ in spans]
        return cls.from_counts(rows, asking, [last - first for *_, first, last in spans])

    @classmethod
    def from_counts(cls, rows: Tensor, asking: Sequence[int], seen: Sequence[int]) -> Ragged:
        bounds = [torch.tensor([0, *each]).cumsum(0).int().to(device()) for each in (asking, seen)]
        return cls(rows.to(device()), *bounds, max(asking), max(seen))


def _ask(query_SND: Tensor, key_CGD: Tensor, value_CGD: Tensor, ragged: Ragged) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(
        query_SND.index_select(0, ragged.rows),
        key_CGD,
        value_CGD,
        ragged.bounds_q,
        ragged.bounds_k,
        ragged.longest_q,
        ragged.longest_k,
    )  # type: ignore[return-value]


def _gathered(microbatch: Microbatch) -> Callable[..., Tensor]:
    spans = _spans(microbatch)
    ragged = Ragged.gathered(spans)
    copied = torch.cat([torch.arange(first, last) for *_, first, last in spans]).to(device())

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = key.index_select(0, copied), value.index_select(0, copied)
        attended = _ask(query, keys, values, ragged)
        return torch.zeros_like(query).index_copy(0, ragged.rows, attended)

    return function


def _disjoint(microbatch: Microbatch) -> Callable[..., Tensor]:
    assert microbatch.context is not None
    sets = [
        Ragged.of(each, microbatch.context.length) for each in disjoint_sets(_spans(microbatch))
    ]

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.zeros_like(query)
        for ragged in sets:
            output = output.index_copy(0, ragged.rows, _ask(query, key, value, ragged))
        return output

    return function


def _gathered_te(config: TransformerConfig, microbatch: Microbatch) -> Callable[..., Tensor]:
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    module = TEDotProductAttention(config, 1, AttnMaskType.padding, "cross")
    spans = _spans(microbatch)
    ragged = Ragged.gathered(spans)
    copied = torch.cat([torch.arange(first, last) for *_, first, last in spans]).to(device())
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ragged.bounds_q,
        cu_seqlens_kv=ragged.bounds_k,
        max_seqlen_q=ragged.longest_q,
        max_seqlen_kv=ragged.longest_k,
    )

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        states = (
            query.index_select(0, ragged.rows),
            key.index_select(0, copied),
            value.index_select(0, copied),
        )
        attended = module(*states, None, AttnMaskType.padding, packed_seq_params=packed)
        shaped = attended.reshape(-1, *query.shape[1:])
        return torch.zeros_like(query).index_copy(0, ragged.rows, shaped)

    return function


def _flex_spans(microbatch: Microbatch) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    assert microbatch.context is not None
    tokens, context = len(microbatch.token_ids_S), microbatch.context.length
    first, last = (torch.zeros(tokens, dtype=torch.int32) for _ in range(2))
    for start, stop, begin, end in _spans(microbatch):
        first[start:stop], last[start:stop] = begin, end
    first, last = first.to(device()), last.to(device())

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= first[query]) & (key < last[query])

    mask = create_block_mask(sees, None, None, tokens, context, device())
    compiled = torch.compile(flex_attention, dynamic=False)

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        states = [each.transpose(0, 1)[None] for each in (query, key, value)]
        return compiled(*states, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return function
