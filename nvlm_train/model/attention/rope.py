"""Rotary positions of the language model: megatron-core's embedding, with the family's frequencies.

Shape legend: S tokens of a pack, N local heads, G local KV groups, D head size, P = D / 2 pairs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

from nvlm_train.config.model_schema import LanguageConfig, RopeScalingConfig
from nvlm_train.device_batch import DevicePack
from nvlm_train.geometry import head_size
from nvlm_train.parallel import cpu_kernels
from nvlm_train.parallel.kernels import Kernels, compiled


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
        fp32. By token and pair of channels, [S, 1, D / 2]; for Transformer Engine's kernel, which finds the
        positions by itself, by position, [S, 1, 1, D].
    """
    if kernels.attention == "transformer_engine":
        return rotary(sum(pack.lengths), packed_seq=True)
    return torch.outer(pack.position_ids_S.to(rotary.inv_freq), rotary.inv_freq)[:, None]


@dataclass(frozen=True)
class Turns:
    """How far each token of a pack turns, for all layers: cosine and sine in the layers' precision."""

    cosine_S1P: Tensor
    """[S, 1, D / 2]."""
    sine_S1P: Tensor

    @functools.cached_property
    def whole(self) -> tuple[Tensor, Tensor]:
        """Cosine and sine for all channels of a head, [S, 1, 1, D].

        x turns to x cosine + roll(x, D / 2) sine.
        """
        cosine, sine = self.cosine_S1P, self.sine_S1P
        both = torch.cat((cosine, cosine, -sine, sine), -1)[:, :, None]
        whole_cosine, whole_sine = both.chunk(2, dim=-1)
        return whole_cosine, whole_sine

    @classmethod
    def of(cls, angles_S1P: Tensor, dtype: torch.dtype) -> Turns:
        return cls(angles_S1P.cos().to(dtype), angles_S1P.sin().to(dtype))


def turn(query_SND: Tensor, key_SGD: Tensor, turns: Turns) -> tuple[Tensor, Tensor]:
    """Turns queries and keys of a whole pack by their tokens' positions.

    On a GPU that is one compiled kernel each, forward and backward; on a CPU a function of our own, which
    writes to one new tensor.
    """
    rotate = compiled(_rotate) if query_SND.is_cuda else cpu_kernels.rotary
    cosine, sine = turns.cosine_S1P, turns.sine_S1P
    return rotate(query_SND, cosine, sine), rotate(key_SGD, cosine, sine)


def _rotate(x_SND: Tensor, cosine_S1P: Tensor, sine_S1P: Tensor) -> Tensor:
    first, second = x_SND.chunk(2, dim=-1)
    turned = (
        first * cosine_S1P - second * sine_S1P,
        second * cosine_S1P + first * sine_S1P,
    )
    return torch.cat(turned, dim=-1)


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
