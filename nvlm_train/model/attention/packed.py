"""Attention over all segments or spans of a pack in one kernel, on GPUs: torch's varlen and flex attention.

Shape legend: S tokens of a pack, L its positions whose logits are wanted, C tokens of its context, N
local heads, G local KV groups, D head size.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor

from nvlm_train.model.layers import PackAttention
from nvlm_train.model.pack import Pack, Sight
from nvlm_train.parallel.kernels import compiled


class VarlenAttention(PackAttention):
    """FlashAttention over segments of any lengths; half precision, no dropout."""

    def attend(self, query_SND: Tensor, key_SGD: Tensor, value_SGD: Tensor, packed: Pack) -> Tensor:
        """Computes attention of all tokens within their segments, [S, N, D]."""
        assert self.dropout_now == 0, "choose_cores falls back where weights are dropped"
        function, options = _varlen()
        if self.scale is not None:
            options = options | {"scale": self.scale}
        bounds, longest = packed.cu_seqlens, packed.max_seqlen_q
        attended: Tensor = function(
            query_SND, key_SGD, value_SGD, bounds, bounds, longest, longest, **options
        )
        return attended


@functools.cache
def _varlen() -> tuple[Callable[..., Tensor], dict[str, Any]]:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, causal_options(inspect.signature(varlen_attn).parameters)  # type: ignore[return-value]


def causal_options(parameters: Collection[str]) -> dict[str, Any]:
    """Returns how this torch's `varlen_attn` is told that attention is causal and its heads are grouped.

    torch 2.10 has `is_causal`; since 2.11 a window says so; since 2.12 groups have to be allowed. Before,
    the kernel takes them as they are.

    Args:
        parameters: names of the function's.
    """
    options: dict[str, Any] = (
        {"window_size": (-1, 0)} if "window_size" in parameters else {"is_causal": True}
    )
    return options | ({"enable_gqa": True} if "enable_gqa" in parameters else {})


class FlexAttention(PackAttention):
    """torch's flex attention under the pack's mask; any precision, no dropout."""

    def attend(self, query_SND: Tensor, key_SGD: Tensor, value_SGD: Tensor, packed: Pack) -> Tensor:
        """Computes attention of all tokens within their segments, [S, N, D]."""
        return self._masked(query_SND, key_SGD, value_SGD, packed.masks.tokens)

    def _masked(self, query_QND: Tensor, key_SGD: Tensor, value_SGD: Tensor, mask: Any) -> Tensor:
        assert self.dropout_now == 0, "choose_cores falls back where weights are dropped"
        return attend_masked(query_QND, key_SGD, value_SGD, mask, self.scale)


class FlexOfWanted(FlexAttention):
    """Only the wanted rows ask: no other is computed."""

    def attend(self, query_SND: Tensor, key_SGD: Tensor, value_SGD: Tensor, packed: Pack) -> Tensor:
        """Computes attention of the wanted rows, [L, N, D]."""
        wanted_LND = query_SND.index_select(0, packed.wanted_L)
        return self._masked(wanted_LND, key_SGD, value_SGD, packed.masks.wanted)


def attend_context(
    query_SND: Tensor, key_CGD: Tensor, value_CGD: Tensor, sight: Sight, dropout: float = 0.0
) -> Tensor:
    """Lets all tokens attend to their parts of the context in one kernel, which copies no key.

    Returns:
        Like `query_SND`; zero for tokens that see nothing.
    """
    assert dropout == 0, "choose_cores falls back where weights are dropped"
    return attend_masked(query_SND, key_CGD, value_CGD, sight.mask)


def attend_masked(
    query_QND: Tensor, key_KGD: Tensor, value_KGD: Tensor, mask: Any, scale: float | None = None
) -> Tensor:
    """Computes attention of Q queries to K keys under a BlockMask, [Q, N, D]."""
    assert mask is not None, "masks_for_layers makes the masks that are read"
    states = [each.transpose(0, 1)[None] for each in (query_QND, key_KGD, value_KGD)]
    attended: Tensor = _flex()(*states, block_mask=mask, scale=scale, enable_gqa=True)
    return attended[0].transpose(0, 1)


@functools.cache
def _flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return compiled(flex_attention)
