"""The projector: vision features to the language model's width, tensor-parallel."""

from __future__ import annotations

import copy

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from nvlm_train.config.model_schema import ProjectorConfig
from nvlm_train.model.layers import mlp_spec
from nvlm_train.parallel.kernels import Kernels


class Projector(MegatronModule):
    """The projector is LayerNorm, Linear, GELU, Linear without biases (released NVLM-D; section 4.5).

    NVLM-X has one linear after the norm: whether its projector has a norm is not stated.
    """

    def __init__(
        self,
        config: TransformerConfig,
        projector: ProjectorConfig,
        feature_size: int,
        kernels: Kernels,
    ) -> None:
        projector_config = _projector_config(config, projector)
        super().__init__(projector_config)
        # Every tensor-parallel rank sees all features: this norm must not carry the sequence-parallel mark.
        self.norm = nn.LayerNorm(
            feature_size,
            eps=projector.norm_eps,
            dtype=config.params_dtype,
            device=torch.cuda.current_device(),
        )
        if projector.ffn_hidden_size is None:
            self.mlp: nn.Module = ColumnParallelLinear(
                feature_size,
                config.hidden_size,
                config=projector_config,
                init_method=config.init_method,
                bias=False,
                gather_output=True,
            )
        else:
            self.mlp = MLP(
                projector_config,
                mlp_spec(kernels).submodules,
                input_size=feature_size,
                ffn_hidden_size=projector.ffn_hidden_size,
            )

    def forward(self, features: Tensor) -> Tensor:
        """Projects [..., feature size] to [..., H], whole on every tensor-parallel rank; of no rows, too."""
        rows = features.reshape(-1, 1, features.shape[-1])
        projected, _ = self.mlp(self.norm(rows))
        return projected.view(*features.shape[:-1], projected.shape[-1])  # type: ignore[no-any-return]


def _projector_config(config: TransformerConfig, projector: ProjectorConfig) -> TransformerConfig:
    """Copies the language model's config with what differs. Its linears must not gather a sequence."""
    own = copy.copy(config)
    own.sequence_parallel = False
    own.gated_linear_unit = False
    own.activation_func = F.gelu
    own.bias_activation_fusion = False  # the fused GELU exists with a bias only
    own.add_bias_linear = False
    if projector.ffn_hidden_size is not None:
        own.ffn_hidden_size = projector.ffn_hidden_size
    return own
