"""Perceiver resampler: a tile's features read by a fixed number of latents (Flamingo; NVLM 1.0, appendix C).

NVLM has none, and appendix C shows why; it is here for the Flamingo-style baseline.

Shape legend: T tiles, n tokens per tile, N latents, H hidden, G KV groups, R query heads of a group,
D channels of a head.
"""

from __future__ import annotations

import copy

import torch
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nvlm_train.config.model_schema import ResamplerConfig
from nvlm_train.device_batch import Span
from nvlm_train.model.cross_attention import CrossSubmodules, attend, column_linear, row_linear
from nvlm_train.model.layers import RMSNorm, implementations, mlp_spec
from nvlm_train.model.pack import Sight
from nvlm_train.model.zero_grads import PassedBy, zeros_for
from nvlm_train.parallel.kernels import Kernels


class Resampler(PassedBy, MegatronModule):
    """Latents attend to a tile's features and to themselves, in tensor-parallel layers."""

    def __init__(
        self, config: TransformerConfig, resampler: ResamplerConfig, kernels: Kernels
    ) -> None:
        own = copy.copy(config)
        own.sequence_parallel = False  # every tensor-parallel rank holds all features
        super().__init__(own)
        device = torch.cuda.current_device()
        size = (resampler.num_latents, config.hidden_size)
        self.latents = nn.Parameter(torch.empty(size, dtype=config.params_dtype, device=device))
        self._num_layers = resampler.num_layers
        for number in range(resampler.num_layers):
            # Not a ModuleList: megatron-core would take all that is in one for replicated.
            self.add_module(f"layer_{number}", ResamplerLayer(own, kernels))
        self.norm = RMSNorm(own, config.hidden_size, config.layernorm_epsilon)

    def forward(self, features_TnH: Tensor) -> Tensor:
        """Reads features [T, n, H] into latents [T, N, H]."""
        latents_TNH = self.latents.expand(len(features_TnH), -1, -1)
        if len(features_TnH) == 0:
            # The (empty) sum keeps the projector, which lies behind, in the backward.
            return latents_TNH + zeros_for(latents_TNH, self) + features_TnH.sum()
        for number in range(self._num_layers):
            latents_TNH = self.get_submodule(f"layer_{number}")(latents_TNH, features_TnH)
        output: Tensor = self.norm(latents_TNH)
        return output


class ResamplerLayer(MegatronModule):
    """The latents attend, then pass a feed-forward; both are residual."""

    def __init__(self, config: TransformerConfig, kernels: Kernels) -> None:
        super().__init__(config)
        groups, channels = config.num_query_groups, config.kv_channels
        assert groups is not None and channels is not None
        self._channels = channels
        _, column, row = implementations(kernels)
        linears = CrossSubmodules(column, row)
        self.latent_norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.feature_norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)
        width = config.num_attention_heads * channels
        self.linear_q = column_linear(config, linears, width)
        self.linear_kv = column_linear(config, linears, 2 * groups * channels)
        self.linear_proj = row_linear(config, linears, width)
        self.mlp_norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.mlp = MLP(config, mlp_spec(kernels).submodules)

    def forward(self, latents_TNH: Tensor, features_TnH: Tensor) -> Tensor:
        """Returns the new latents, [T, N, H]."""
        num_tiles, num_latents, _ = latents_TNH.shape
        latents = self.latent_norm(latents_TNH)
        both = torch.cat([self.feature_norm(features_TnH), latents], dim=1)
        query, _ = self.linear_q(latents.flatten(0, 1).unsqueeze(1))
        states, _ = self.linear_kv(both.flatten(0, 1).unsqueeze(1))
        key, value = states.view(len(states), -1, 2, self._channels).unbind(dim=2)
        spans = tuple(
            Span(
                start=tile * num_latents,
                stop=(tile + 1) * num_latents,
                first=tile * both.shape[1],
                last=(tile + 1) * both.shape[1],
            )
            for tile in range(num_tiles)
        )
        attended = attend(
            query.view(len(query), -1, self._channels),
            key,
            value,
            Sight(spans),
        )
        output, _ = self.linear_proj(attended.reshape(len(attended), 1, -1))
        latents_TNH = latents_TNH + output.view_as(latents_TNH)
        output, _ = self.mlp(self.mlp_norm(latents_TNH).flatten(0, 1).unsqueeze(1))
        return latents_TNH + output.view_as(latents_TNH)
