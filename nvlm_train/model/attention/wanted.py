"""Self-attention of the last layer on CPUs: what `segments` does, for the rows whose logits are wanted.

Shape legend: S tokens of a pack, L wanted rows, A rows that ask, G local KV groups, R query heads of a
group, D head size. "Heads first" is [G, heads, S, D].
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nvlm_train.model.attention.segments import (
    Scores,
    attend_segment,
    attend_segment_backward,
    turn_heads,
    turn_heads_back,
)
from nvlm_train.model.last_layer import ROWS_AT_ONCE
from nvlm_train.model.pack import Pack


class Part(NamedTuple):
    """Says which rows ask, of one segment, and which keys they read."""

    rows: Sequence[int]
    """Of the pack, ascending."""
    start: int
    stop: int
    """The keys, of the pack."""
    is_causal: bool
    """Whether all rows of the segment ask; otherwise they are told by a mask what they see."""

    def mask(self, dtype: torch.dtype) -> Tensor | None:
        """Returns what is added to scores, [rows, keys]."""
        if self.is_causal:
            return None
        sees = np.arange(self.start, self.stop) <= np.asarray(self.rows)[:, None]
        return torch.from_numpy(np.where(sees, np.float32(0), np.float32("-inf"))).to(dtype)


def parts_of(lengths: Sequence[int], wanted: Sequence[int]) -> Iterator[Part]:
    """Cuts a pack into parts. With most rows of a segment wanted, the causal kernel for all is faster."""
    for start, stop in pairwise(accumulate(lengths, initial=0)):
        rows = wanted[bisect.bisect_left(wanted, start) : bisect.bisect_left(wanted, stop)]
        if 2 * len(rows) > stop - start:
            yield Part(range(start, stop), start, stop, is_causal=True)
            continue
        for first in range(0, len(rows), ROWS_AT_ONCE):
            some = rows[first : first + ROWS_AT_ONCE]
            yield Part(some, start, some[-1] + 1, is_causal=False)


class Asking(NamedTuple):
    """Describes who asks in a pack."""

    parts: tuple[Part, ...]
    asking_A: Tensor
    """int64, rows of the pack."""
    wanted_L: Tensor | None
    """int64, which of the asking rows are wanted; None where all are."""
    scale: float | None

    @classmethod
    def of(cls, pack: Pack, scale: float | None) -> Asking:
        parts = tuple(parts_of(pack.lengths, pack.wanted))
        if not any(part.is_causal for part in parts):
            return cls(parts, pack.wanted_L, None, scale)
        asking = np.concatenate([np.asarray(part.rows) for part in parts])
        wanted = np.searchsorted(asking, pack.wanted)
        return cls(parts, torch.from_numpy(asking), torch.from_numpy(wanted), scale)


def attend_wanted(heads_SGHD: Tensor, pack: Pack, scale: float | None) -> Tensor:
    """Turns queries and keys, and computes causal attention of the wanted rows within their segments.

    Args:
        heads_SGHD: [S, G, R + 2, D]: by group its queries, its key and its value.
        pack: with its turns.
        scale: of scores; None for 1 / sqrt(D).

    Returns:
        [L, 1, G R D].
    """
    assert pack.turns is not None
    attended: Tensor = _OfWanted.apply(heads_SGHD, *pack.turns.whole, Asking.of(pack, scale))
    return attended


class _OfWanted(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, heads_SGHD: Tensor, cosine: Tensor, sine: Tensor, asking: Asking
    ) -> Tensor:
        by_head = turn_heads(heads_SGHD, cosine, sine).permute(1, 2, 0, 3)
        values = heads_SGHD.permute(1, 2, 0, 3)[:, -1:]
        keys = by_head[:, -1:]
        queries = by_head[:, :-1].index_select(2, asking.asking_A)
        saved, found = [], []
        for part, query in zip(
            asking.parts, queries.split([len(part.rows) for part in asking.parts], 2), strict=True
        ):
            key, value = (each[:, :, part.start : part.stop] for each in (keys, values))
            scores = Scores(part.is_causal, asking.scale, part.mask(query.dtype))
            output, logsumexp = attend_segment(query, key, value, scores)
            saved += [query, key, value, output, logsumexp, scores.mask]
            found.append(output)
        groups, heads, size, channels = queries.shape
        output = queries.new_empty(size, groups, heads, channels)
        if found:
            torch.cat(found, dim=2, out=output.permute(1, 2, 0, 3))
        if asking.wanted_L is not None:
            output = output.index_select(0, asking.wanted_L)
        ctx.asking, ctx.shape, ctx.size = asking, heads_SGHD.shape, size
        ctx.save_for_backward(cosine, sine, *saved)
        return output.view(len(output), 1, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        cosine, sine, *saved = ctx.saved_tensors
        asking: Asking = ctx.asking
        _, groups, heads, channels = ctx.shape
        grad = grad.reshape(-1, groups, heads - 2, channels)
        if asking.wanted_L is not None:
            wanted = grad
            grad = grad.new_zeros(ctx.size, *grad.shape[1:])
            grad.index_add_(0, asking.wanted_L, wanted)
        total = cosine.new_zeros(ctx.shape)
        by_head = total.permute(1, 2, 0, 3)
        of_keys, of_queries = by_head[:, -2:], []
        grads = grad.permute(1, 2, 0, 3).split([len(part.rows) for part in asking.parts], 2)
        for number, (part, grad_out) in enumerate(zip(asking.parts, grads, strict=True)):
            *states, mask = saved[6 * number : 6 * number + 6]
            scores = Scores(part.is_causal, asking.scale, mask)
            found = attend_segment_backward(grad_out, states, scores)
            of_queries.append(found[0])
            of_keys[:, :, part.start : part.stop].add_(torch.cat(found[1:], dim=1))
        if of_queries:
            by_head[:, :-2].index_add_(2, asking.asking_A, torch.cat(of_queries, dim=2))
        turn_heads_back(total, cosine, sine)
        return total, None, None, None
