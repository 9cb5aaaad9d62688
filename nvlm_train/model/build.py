"""Builds a stage's model: the megatron-core config, the module, what is frozen."""

from __future__ import annotations

from collections.abc import Collection

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional as F

from nvlm_train.config.layouts import recomputed_parts
from nvlm_train.config.schema import Recipe, StageConfig
from nvlm_train.geometry import head_size, pack_length
from nvlm_train.model.global_weights import part_of
from nvlm_train.model.nvlm import NVLM
from nvlm_train.parallel.kernels import Kernels
from nvlm_train.parallel.topology import Topology

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

RECOMPUTED = {"norms": "layernorm", "mlp": "mlp", "attention": "core_attn"}
"""A part of a layer in the recipe's words -> in megatron-core's."""


def transformer_config(recipe: Recipe, stage: StageConfig, kernels: Kernels) -> TransformerConfig:
    """Makes megatron-core's config of the language model in one stage's layout."""
    language, parallel = recipe.model.language, stage.parallel
    dtype = DTYPES[recipe.precision]
    whole = parallel.recompute == "full"
    parts = [RECOMPUTED[part] for part in recomputed_parts(parallel)]
    return TransformerConfig(
        num_layers=language.num_layers,
        hidden_size=language.hidden_size,
        num_attention_heads=language.num_heads,
        num_query_groups=language.num_kv_heads,
        kv_channels=head_size(language),
        qk_layernorm=language.qk_norm,
        ffn_hidden_size=language.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=language.norm_eps,
        add_bias_linear=False,
        add_qkv_bias=language.qkv_bias,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=stage.hidden_dropout,
        attention_dropout=stage.attention_dropout,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=recipe.precision == "bf16",
        calculate_per_token_loss=True,
        # The values are overwritten (model/global_weights.py), but only initialisation marks weights as
        # tensor-parallel, and an unmarked one is left out of the gradient norm on all ranks but one.
        perform_initialization=True,
        gradient_accumulation_fusion=kernels.weight_gradient != "separate",
        masked_softmax_fusion=False,
        # Without dropout nothing is left to fuse with the addition; with it, compiled masks would be others.
        bias_dropout_fusion=False,
        bias_activation_fusion=True,
        # By default every transfer between stages ends with a synchronisation of the whole device.
        batch_p2p_sync=False,
        # Its kernel turns all segments of a pack at once.
        apply_rope_fusion=kernels.attention == "transformer_engine",
        recompute_granularity="full" if whole else "selective" if parts else None,
        recompute_modules=parts,
        recompute_method="uniform" if whole else None,
        recompute_num_layers=1 if whole else None,
    )


def build_model(recipe: Recipe, stage: StageConfig, topology: Topology, kernels: Kernels) -> NVLM:
    """Builds this rank's shard of the model with uninitialised weights, frozen as the stage says."""
    config = transformer_config(recipe, stage, kernels)
    model = NVLM(config, recipe.model, pack_length(stage), topology, kernels)
    freeze(model, stage.trainable)
    return model


def freeze(model: NVLM, trainable: Collection[str]) -> None:
    """Turns gradients on for the named parts and off for all others."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in trainable)
