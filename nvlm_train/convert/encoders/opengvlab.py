"""InternViT in the layout of OpenGVLab's own code (`modeling_intern_vit.py`), and in NVLM-D's.

Queries, keys and values are one projection there, as in ours. NVLM-D 72B was trained with a tensor-parallel
size of 8: its 25 heads were filled up to 32 with heads that add nothing, and its files have them still.
"""

from __future__ import annotations

from nvlm_train.convert.encoders.layout import Layout, Piece, sizes
from nvlm_train.convert.family import Family
from nvlm_train.convert.ignored import BOOKKEEPING, GENERATION
from nvlm_train.convert.keys import Fixed, Rule, Sized

_OURS, _LAYER = "encoder.layer.{n}.", "encoder.layers.{n}."
_QKV = f"{_LAYER}attn.qkv."
MODEL_TYPE = "intern_vit_6b"
"""What OpenGVLab's config.json of InternViT-300M says, too."""

_COMPUTED: tuple[Rule, ...] = (
    Fixed("architectures", (["InternVisionModel"], None), None),
    Sized("num_hidden_layers", "num_layers", 48),
    Sized("hidden_size", "hidden_size", 3200),
    Sized("num_attention_heads", "num_heads", 25),
    Sized("intermediate_size", "ffn_hidden_size", 12_800),
    # Norms of queries and keys have it as well, here and there.
    Sized("layer_norm_eps", "norm_eps", 1e-6),
    Sized("image_size", "tile_size", 224),
    Sized("patch_size", "patch_size", 14),
    Fixed("num_channels", (3,), 3),
    Fixed("hidden_act", ("gelu",), "gelu"),
    Fixed("quantization_config", (None,), None),
    Fixed("pruned_heads", ({}, None), None),
    Fixed("is_encoder_decoder", (False,), False),
    Fixed("add_cross_attention", (False,), False),
    Fixed("return_dict", (True,), True),
    # The configs of InternVL 2.5 and 3 have it, with the sizes in `_EXPERTS`.
    Fixed("use_moe", (False,), False),
)
"""Keys that mean the same for both kinds. Defaults are those of OpenGVLab's InternVisionConfig."""

_EXPERTS = frozenset({
    "capacity_factor", "eval_capacity_factor", "laux_allreduce", "moe_coeff_ratio",
    "moe_intermediate_size", "moe_output_scale", "noisy_gate_policy", "num_experts",
    "num_routed_experts", "num_shared_experts", "shared_expert_intermediate_size", "use_residual",
    "use_rts", "use_weighted_residual",
})  # fmt: skip
"""Sizes and habits of experts that an encoder with `use_moe: false` does not have; the published code reads
none of them."""

_IGNORED = (
    BOOKKEEPING
    | _EXPERTS
    | GENERATION
    # Dropout is off in a frozen encoder; a layer's scale is in its weights, this is their start.
    | {"dropout", "drop_path_rate", "initializer_factor"}
    # How attention is computed, and where OpenGVLab's code lies.
    | {"use_flash_attn", "auto_map"}
    # An encoder has no words.
    | {"tie_word_embeddings", "pad_token_id", "is_decoder"}
)

_TENSORS: dict[str, tuple[str | int, ...]] = {
    "embeddings.class_embedding": (1, 1, "hidden"),
    "embeddings.position_embedding": (1, "positions", "hidden"),
    "embeddings.patch_embedding.weight": ("hidden", 3, "patch", "patch"),
    "embeddings.patch_embedding.bias": ("hidden",),
    f"{_LAYER}norm1.weight": ("hidden",),
    f"{_QKV}weight": ("qkv", "hidden"),
    f"{_LAYER}attn.proj.weight": ("hidden", "width"),
    f"{_LAYER}attn.proj.bias": ("hidden",),
    f"{_LAYER}ls1": ("hidden",),
    f"{_LAYER}norm2.weight": ("hidden",),
    f"{_LAYER}mlp.fc1.weight": ("ffn", "hidden"),
    f"{_LAYER}mlp.fc1.bias": ("ffn",),
    f"{_LAYER}mlp.fc2.weight": ("hidden", "ffn"),
    f"{_LAYER}mlp.fc2.bias": ("hidden",),
    f"{_LAYER}ls2": ("hidden",),
}
"""What both kinds have."""

_RENAMED = {
    "embeddings.cls_token": "embeddings.class_embedding",
    "embeddings.position_embeddings": "embeddings.position_embedding",
    "embeddings.patch_embeddings.projection.weight": "embeddings.patch_embedding.weight",
    "embeddings.patch_embeddings.projection.bias": "embeddings.patch_embedding.bias",
    f"{_OURS}layernorm_before.weight": f"{_LAYER}norm1.weight",
    f"{_OURS}layernorm_before.bias": f"{_LAYER}norm1.bias",
    f"{_OURS}attention.projection_layer.bias": f"{_LAYER}attn.proj.bias",
    f"{_OURS}lambda_1": f"{_LAYER}ls1",
    f"{_OURS}layernorm_after.weight": f"{_LAYER}norm2.weight",
    f"{_OURS}layernorm_after.bias": f"{_LAYER}norm2.bias",
    f"{_OURS}mlp.fc1.weight": f"{_LAYER}mlp.fc1.weight",
    f"{_OURS}mlp.fc1.bias": f"{_LAYER}mlp.fc1.bias",
    f"{_OURS}mlp.fc2.weight": f"{_LAYER}mlp.fc2.weight",
    f"{_OURS}mlp.fc2.bias": f"{_LAYER}mlp.fc2.bias",
    f"{_OURS}lambda_2": f"{_LAYER}ls2",
}
_PIECES = {
    **{ours: Piece(stored) for ours, stored in _RENAMED.items()},
    **{
        # Between the blocks may be dummy heads.
        f"{_OURS}attention.qkv.{kind}": tuple(
            Piece(f"{_QKV}{kind}", along=0, block=block) for block in range(3)
        )
        for kind in ("weight", "bias")
    },
    **{
        f"{_OURS}attention.{name}_norm.weight": Piece(f"{_LAYER}attn.{name}_norm.weight", along=0)
        for name in "qk"
    },
    f"{_OURS}attention.projection_layer.weight": Piece(f"{_LAYER}attn.proj.weight", along=1),
}

OPENGVLAB_6B = Layout(
    Family(
        model_type=MODEL_TYPE,
        keys=(
            *_COMPUTED,
            # The config.json of V1-5 does not have it, and its code takes this value.
            Fixed("norm_type", ("rms_norm",), "rms_norm"),
            Fixed("qk_normalization", (True,), True),
            Fixed("qkv_bias", (False,), False),
        ),
        ignored=_IGNORED,
        tensors=_TENSORS | {f"{_LAYER}attn.{name}_norm.weight": ("width",) for name in "qk"},
        sizes=sizes,
        optional=lambda vision: frozenset(),
    ),
    _PIECES,
    fused=f"{_QKV}weight",
)

OPENGVLAB_300M = Layout(
    Family(
        model_type=MODEL_TYPE,
        keys=(
            *_COMPUTED,
            Fixed("norm_type", ("layer_norm",), "rms_norm"),
            Fixed("qk_normalization", (False,), True),
            Fixed("qkv_bias", (True,), False),
        ),
        ignored=_IGNORED,
        tensors=_TENSORS
        | {f"{_QKV}bias": ("qkv",)}
        | {f"{_LAYER}norm{number}.bias": ("hidden",) for number in (1, 2)},
        sizes=sizes,
        optional=lambda vision: frozenset(),
    ),
    _PIECES,
)
