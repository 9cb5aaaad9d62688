"""Chooses which attention runs where: the one place that weighs the machine's kernels against a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from nvlm_train.parallel.kernels import Kernels


@dataclass(frozen=True)
class Cores:
    """Names an attention for each of the three tasks of a decoder."""

    tokens: Literal["transformer_engine", "varlen", "flex", "sdpa"]
    """Tokens of a sample read those before them."""
    wanted: Literal["transformer_engine", "flex", "sdpa"]
    """The last layer's wanted rows do."""
    context: Literal["flex", "sdpa"]
    """Tokens read the cross-attention context."""
    reason: str | None = None
    """Why a GPU runs one call a segment or a span; None where it does not."""

    def __str__(self) -> str:
        return f"tokens={self.tokens} wanted={self.wanted} context={self.context}"


def choose_cores(config: TransformerConfig, kernels: Kernels) -> Cores:
    """Chooses attentions. It is a pure function, so that it is tested without a GPU.

    Neither of torch's two kernels over whole packs drops attention weights, and each has head sizes that
    it takes. Where they cannot run, SDPA is called for each segment and each span, as on a CPU.
    """
    if kernels.attention == "torch_sdpa" and kernels.cross_attention == "torch_sdpa":
        return Cores("sdpa", "sdpa", "sdpa")
    reason = _reason_against_flex(config)
    flex: Literal["flex", "sdpa"] = "flex" if reason is None else "sdpa"
    context = flex if kernels.cross_attention == "torch_flex" else "sdpa"
    if kernels.attention == "transformer_engine":
        return Cores("transformer_engine", "transformer_engine", context, reason)
    if kernels.attention == "torch_varlen" and reason is None and _fits_varlen(config):
        return Cores("varlen", flex, context)
    return Cores(flex, flex, context, reason)


def _reason_against_flex(config: TransformerConfig) -> str | None:
    if config.attention_dropout > 0:
        return (
            f"attention_dropout={config.attention_dropout}: torch's attention over whole packs drops no "
            f"weights; 0 turns it on"
        )
    assert config.kv_channels is not None
    if config.kv_channels < SMALLEST_FLEX:
        return (
            f"head size {config.kv_channels}: torch's attention over whole packs takes "
            f"{SMALLEST_FLEX} channels or more"
        )
    return None


def _fits_varlen(config: TransformerConfig) -> bool:
    """FlashAttention 2's kernels: half precision, and heads of whole vectors."""
    assert config.kv_channels is not None
    is_half = config.params_dtype in (torch.bfloat16, torch.float16)
    return is_half and config.kv_channels % 8 == 0 and config.kv_channels <= LARGEST_VARLEN


SMALLEST_FLEX = 16
"""Channels of a head: triton's matrix products take no fewer."""
LARGEST_VARLEN = 256
