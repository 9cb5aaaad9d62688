"""Self-attention on CPUs as one function from projected queries, keys and values to its output.

Composed by autograd, every cut of a pack into segments is a node of its own forward and backward, and
each writes tensors of the pack's size. Here segments are views, and what the kernels return is written once
where it belongs: the output, and the gradient of the projection.

Shape legend: S tokens of a pack, G local KV groups, R query heads of a group, D head size.
"Heads first" is [G, heads, S, D].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nvlm_train.model.pack import Pack

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def turn_heads(heads_SGHD: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Returns queries and keys turned, [S, G, R + 1, D]; cosine and sine are `Turns.whole`."""
    turning = heads_SGHD[:, :, :-1]
    other = turning.roll(turning.shape[-1] // 2, -1)
    return torch.mul(turning, cosine).addcmul_(other, sine)


def turn_heads_back(grad_SGHD: Tensor, cosine: Tensor, sine: Tensor) -> None:
    """Turns the gradients of queries and keys by the negative angles, in place."""
    turning = grad_SGHD[:, :, :-1]
    other = turning.roll(turning.shape[-1] // 2, -1)
    turning.mul_(cosine).addcmul_(other, sine, value=-1)


class Scores(NamedTuple):
    """Says which scores count, and how they are scaled."""

    is_causal: bool = False
    scale: float | None = None
    """None for 1 / sqrt(D)."""
    mask: Tensor | None = None
    """What is added to scores, [queries, keys]."""

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the kernels."""
        return {"attn_mask": self.mask, "scale": self.scale}


def attend_segment(
    query: Tensor, key: Tensor, value: Tensor, scores: Scores
) -> tuple[Tensor, Tensor]:
    """Computes attention. Returns it and the scores' logsumexp.

    The kernel knows KV groups, and takes any of these as views: no group is repeated or copied.

    Args:
        query: [batch, query heads, queries, D].
        key: [batch, KV groups, keys, D].
        value: like `key`.
        scores: which of them count.
    """
    return _attend(query, key, value, 0.0, scores.is_causal, **scores.options)  # type: ignore[no-any-return]


def attend_segment_backward(
    grad: Tensor, states: Sequence[Tensor], scores: Scores
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the gradients of query, key and value of `attend_segment`.

    Args:
        grad: of its output.
        states: query, key, value, output and logsumexp.
        scores: as they were given.
    """
    return _attend_backward(grad, *states, 0.0, scores.is_causal, **scores.options)  # type: ignore[no-any-return]


class Segments(NamedTuple):
    """Says how a pack is cut, and how scores are scaled."""

    lengths: tuple[int, ...]
    scale: float | None


def attend_joined(heads_SGHD: Tensor, pack: Pack, scale: float | None) -> Tensor:
    """Turns queries and keys, and computes causal attention within each segment.

    Args:
        heads_SGHD: [S, G, R + 2, D]: by group its queries, its key and its value.
        pack: with its turns.
        scale: of scores; None for 1 / sqrt(D).

    Returns:
        [S, 1, G R D].
    """
    assert pack.turns is not None
    cosine, sine = pack.turns.whole
    attended: Tensor = _Joined.apply(heads_SGHD, cosine, sine, Segments(pack.lengths, scale))
    return attended


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, heads_SGHD: Tensor, cosine: Tensor, sine: Tensor, segments: Segments
    ) -> Tensor:
        turned = turn_heads(heads_SGHD, cosine, sine)
        by_head = turned.permute(1, 2, 0, 3)
        values = heads_SGHD.permute(1, 2, 0, 3)[:, -1:]
        states = [
            each.split(segments.lengths, dim=2)
            for each in (by_head[:, :-1], by_head[:, -1:], values)
        ]
        scores = Scores(is_causal=True, scale=segments.scale)
        found = [
            attend_segment(query, key, value, scores)
            for query, key, value in zip(*states, strict=True)
        ]
        size, groups, heads, channels = turned.shape
        output = turned.new_empty(size, groups, heads - 1, channels)
        output_by_head = output.permute(1, 2, 0, 3)
        torch.cat([part for part, _ in found], dim=2, out=output_by_head)
        ctx.segments, ctx.shape = segments, heads_SGHD.shape
        ctx.save_for_backward(
            cosine,
            sine,
            *(part for state in states for part in state),
            *output_by_head.split(segments.lengths, dim=2),
            *(logsumexp for _, logsumexp in found),
        )
        return output.view(size, 1, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        cosine, sine, *saved = ctx.saved_tensors
        size, groups, heads, channels = ctx.shape
        lengths, scale = ctx.segments
        count = len(lengths)
        queries, keys, values, outputs, sums = (
            saved[n * count : (n + 1) * count] for n in range(5)
        )
        grads = (
            grad.reshape(size, groups, heads - 2, channels).permute(1, 2, 0, 3).split(lengths, 2)
        )
        total = cosine.new_empty(ctx.shape)
        for target, grad_out, *states in zip(
            total.permute(1, 2, 0, 3).split(lengths, dim=2),
            grads, queries, keys, values, outputs, sums,
            strict=True,
        ):  # fmt: skip
            parts = attend_segment_backward(grad_out, states, Scores(is_causal=True, scale=scale))
            torch.cat(parts, dim=1, out=target)
        turn_heads_back(total, cosine, sine)
        return total, None, None, None
