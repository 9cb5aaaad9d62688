"""Rotary positions of the language model: megatron-core's embedding, with the family's frequencies."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

from nvlm_train.config.model_schema import LanguageConfig, RopeScalingConfig
from nvlm_train.device_batch import DevicePack
from nvlm_train.geometry import head_size
from nvlm_train.parallel.kernels import Kernels


def rotary_embedding(language: LanguageConfig) -> RotaryEmbedding:
    """Builds the embedding that turns pairs of a head's channels by position times frequency.

    Its frequencies are fp32 [head_size / 2], on this rank's device; they are no weights.
    """
    rotary = RotaryEmbedding(
        kv_channels=head_size(language), rotary_percent=1.0, rotary_base=language.rope_theta
    )
    if language.rope_scaling is not None:
        rotary.inv_freq = SCALINGS[language.rope_scaling.kind](
            rotary.inv_freq, language.rope_scaling
        )
    return rotary


def angles(rotary: RotaryEmbedding, pack: DevicePack, kernels: Kernels) -> Tensor:
    """Makes the angles of a pack, whose positions restart with every sample.

    Returns:
        fp32. By token, [S, 1, D]; for Transformer Engine's kernel, which finds the positions by itself, by
        position, [S, 1, 1, D].
    """
    if kernels.attention == "transformer_engine":
        return rotary(sum(pack.lengths), packed_seq=True)
    half_SD = torch.outer(pack.position_ids_S.to(rotary.inv_freq), rotary.inv_freq)
    return torch.cat([half_SD, half_SD], dim=-1)[:, None]


def _linear(frequencies: Tensor, scaling: RopeScalingConfig) -> Tensor:
    return frequencies / scaling.factor


def _llama3(frequencies: Tensor, scaling: RopeScalingConfig) -> Tensor:
    """Slows channels down by how often they turn within the original length (Llama 3.1).

    megatron-core has this rule with fixed bounds (1, 4 and 8,192 positions); a config.json states them.
    """
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return torch.lerp(frequencies / scaling.factor, frequencies, kept)


SCALINGS: Mapping[str, Callable[[Tensor, RopeScalingConfig], Tensor]] = {
    "linear": _linear,
    "llama3": _llama3,
}
"""`rope_scaling.kind` to what it makes of the frequencies."""
