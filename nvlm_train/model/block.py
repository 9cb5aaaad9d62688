"""The decoder's layers on this pipeline stage: which modules megatron-core puts where."""

from __future__ import annotations

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from nvlm_train.config.model_schema import CrossAttentionConfig
from nvlm_train.model.attention import chosen
from nvlm_train.model.attention.choice import choose_cores
from nvlm_train.model.attention.joined import JoinedSelfAttention
from nvlm_train.model.cross_attention import (
    CrossLayer,
    CrossSubmodules,
    GatedCrossAttention,
    GatedFeedForwardLayer,
)
from nvlm_train.model.last_layer import as_last
from nvlm_train.model.layers import implementations, mask_type, mlp_spec
from nvlm_train.parallel.kernels import Kernels


def decoder_block_spec(
    config: TransformerConfig, cross: CrossAttentionConfig | None, kernels: Kernels
) -> TransformerBlockSubmodules:
    """Describes this pipeline stage's layers: pre-norm self-attention, SwiGLU MLP; QKV bias and QK-norm are
    the config's.

    Norms stay modules of their own on every path, so that checkpoints have one set of names. Layers
    are numbered from 1 through all stages; cross-attention is in those that `cross.every` divides.
    """
    offset = get_transformer_layer_offset(config)
    numbers = range(offset + 1, offset + 1 + get_num_layers_to_build(config))
    layers = [
        _cross_layer(config, cross, kernels)
        if cross and number % cross.every == 0
        else _layer(config, kernels)
        for number in numbers
    ]
    if numbers[-1] == config.num_layers:
        layers[-1] = as_last(layers[-1], chosen.of_wanted(choose_cores(config, kernels)))
    norm, *_ = implementations(kernels)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)


def _layer(config: TransformerConfig, kernels: Kernels) -> ModuleSpec:
    return ModuleSpec(module=TransformerLayer, submodules=_submodules(config, kernels))


def _cross_layer(
    config: TransformerConfig, cross: CrossAttentionConfig, kernels: Kernels
) -> ModuleSpec:
    norm, column, row = implementations(kernels)
    submodules = _submodules(config, kernels)
    submodules.pre_cross_attn_layernorm = norm
    submodules.cross_attention = ModuleSpec(
        module=GatedCrossAttention,
        submodules=CrossSubmodules(column, row, chosen.of_context(choose_cores(config, kernels))),
    )
    submodules.cross_attn_bda = get_bias_dropout_add
    kind = GatedFeedForwardLayer if cross.feed_forward == "gated" else CrossLayer
    return ModuleSpec(module=kind, submodules=submodules)


def _submodules(config: TransformerConfig, kernels: Kernels) -> TransformerLayerSubmodules:
    norm, column, row = implementations(kernels)
    head_norm = norm if config.qk_layernorm else None
    self_attention = ModuleSpec(
        module=JoinedSelfAttention,
        params={"attn_mask_type": mask_type(kernels)},
        submodules=SelfAttentionSubmodules(
            linear_qkv=column,
            core_attention=chosen.of_tokens(choose_cores(config, kernels)),
            linear_proj=row,
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )
    return TransformerLayerSubmodules(
        input_layernorm=norm,
        self_attention=self_attention,
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=norm,
        mlp=mlp_spec(kernels),
        mlp_bda=get_bias_dropout_add,
    )
