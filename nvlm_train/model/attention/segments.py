"""Self-attention on CPUs as one function from projected queries, keys and values to its output.

Composed by autograd, every cut of a pack into segments is a node of its own forward and backward, and
each writes tensors of the pack's size. Here segments are views, and what the kernels return is written once
where it belongs: the output, and the gradient of the projection.

Shape legend: S tokens of a pack, G local KV groups, R query heads of a group, D head size, X = G (R + 2) D
projected channels. "Heads first" is [G, heads, S, D].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from nvlm_train.model.layers import SdpaAttention
from nvlm_train.model.pack import Pack

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class JoinedSelfAttention(SelfAttention):
    """megatron-core's self-attention, which goes from one projection to the other in one function.

    It does so with `SdpaAttention` on a CPU. Dropout of attention weights, norms of queries and keys, and a
    core attention that is made again in backward take megatron-core's way.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: Pack,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the output [S, 1, H], the last layer's [L, 1, H], and the projection's bias."""
        if hidden_states.is_cuda or not self._is_plain(packed_seq_params):
            return super().forward(  # type: ignore[no-any-return]
                hidden_states, attention_mask, packed_seq_params=packed_seq_params, **others
            )
        mixed_SBX, _ = self.linear_qkv(hidden_states)
        heads_SGHD = mixed_SBX.view(
            len(mixed_SBX), self.num_query_groups_per_partition, -1, self.core_attention.channels
        )
        attended = attend_joined(heads_SGHD, packed_seq_params, self.core_attention.scale)
        return self.linear_proj(attended)  # type: ignore[no-any-return]

    def _is_plain(self, pack: Pack) -> bool:
        return (
            type(self.core_attention) is SdpaAttention
            and self.core_attention.dropout_now == 0
            and self.q_layernorm is None
            and self.k_layernorm is None
            and pack.turns is not None
            and self.config.num_query_groups >= self.world_size
            and not (self.checkpoint_core_attention and self.training)
        )


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
        turning = heads_SGHD[:, :, :-1]
        turned = torch.mul(turning, cosine).addcmul_(turning.roll(cosine.shape[-1] // 2, -1), sine)
        by_head = turned.permute(1, 2, 0, 3)
        values = heads_SGHD.permute(1, 2, 0, 3)[:, -1:]
        states = [
            each.split(segments.lengths, dim=2) for each in (by_head[:, :-1], by_head[:, -1:], values)
        ]
        found = [
            _attend(*each, 0.0, True, scale=segments.scale) for each in zip(*states, strict=True)
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
        grads = grad.reshape(size, groups, heads - 2, channels).permute(1, 2, 0, 3).split(lengths, 2)
        total = cosine.new_empty(ctx.shape)
        for target, grad_out, *states in zip(
            total.permute(1, 2, 0, 3).split(lengths, dim=2),
            grads, queries, keys, values, outputs, sums,
            strict=True,
        ):  # fmt: skip
            parts = _attend_backward(grad_out, *states, 0.0, True, scale=scale)
            torch.cat(parts, dim=1, out=target)
        turning = total[:, :, :-1]
        turned_back = turning.roll(cosine.shape[-1] // 2, -1)
        turning.mul_(cosine).addcmul_(turned_back, sine, value=-1)
        return total, None, None, None
