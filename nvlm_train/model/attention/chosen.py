"""The modules and functions of the attentions that `choose_cores` names."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from nvlm_train.model.attention.choice import Cores
from nvlm_train.model.attention.packed import (
    FlexAttention,
    FlexOfWanted,
    VarlenAttention,
    attend_context,
)
from nvlm_train.model.last_layer import SdpaOfWanted, selecting
from nvlm_train.model.layers import SdpaAttention


def of_tokens(cores: Cores) -> type:
    """Returns megatron-core's core attention of all layers but the last."""
    if cores.tokens == "transformer_engine":
        return _engine()
    return {"varlen": VarlenAttention, "flex": FlexAttention, "sdpa": SdpaAttention}[cores.tokens]


def of_wanted(cores: Cores) -> type:
    """Returns that of the last layer."""
    if cores.wanted == "transformer_engine":
        # It knows no positions.
        return selecting(_engine())
    return {"flex": FlexOfWanted, "sdpa": SdpaOfWanted}[cores.wanted]


def of_context(cores: Cores) -> Callable[..., Tensor] | None:
    """Returns what attends to a context; None for `cross_attention.attend`, one call a span."""
    return attend_context if cores.context == "flex" else None


def _engine() -> type:
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    return TEDotProductAttention  # type: ignore[no-any-return]
