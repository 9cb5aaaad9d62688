"""InternViT as transformers' InternVL vision model has it. Our encoder has its names, but for queries, keys
and values, which are one matrix in ours."""

from __future__ import annotations

from nvlm_train.convert.encoders.layout import Layout, joined, sizes
from nvlm_train.convert.family import Family
from nvlm_train.convert.ignored import BOOKKEEPING, GENERATION
from nvlm_train.convert.keys import Fixed, Rule, Sized, edge

_LAYER = "encoder.layer.{n}."

_COMPUTED: tuple[Rule, ...] = (
    # The second is the name in OpenGVLab's own code, which converted files may keep.
    Fixed("architectures", (["InternVLVisionModel"], ["InternVisionModel"], None), None),
    Sized("num_hidden_layers", "num_layers", 24),
    Sized("hidden_size", "hidden_size", 1024),
    Sized("num_attention_heads", "num_heads", 16),
    Sized("intermediate_size", "ffn_hidden_size", 4096),
    Sized("layer_norm_eps", "norm_eps", 1e-6),
    Sized("image_size", "tile_size", [448, 448], read=edge),
    Sized("patch_size", "patch_size", [14, 14], read=edge),
    Fixed("num_channels", (3,), 3),
    Fixed("hidden_act", ("gelu",), "gelu"),
    Fixed("use_absolute_position_embeddings", (True,), True),
    Fixed("use_mask_token", (False,), False),
    # Without it a norm follows the last layer, which NVLM's encoder does not have.
    Fixed("use_mean_pooling", (True,), True),
    Fixed("quantization_config", (None,), None),
    Fixed("pruned_heads", ({}, None), None),
    Fixed("is_encoder_decoder", (False,), False),
    Fixed("add_cross_attention", (False,), False),
    Fixed("return_dict", (True,), True),
)
"""Keys that mean the same for both kinds. Defaults are those of transformers' InternVLVisionConfig."""

_IGNORED = (
    BOOKKEEPING
    | GENERATION
    # Dropout is off in a frozen encoder; a layer's scale is in its weights, this is their start.
    | {"hidden_dropout_prob", "projection_dropout", "layer_scale_init_value"}
    # Keys of OpenGVLab's configs that transformers' own converter keeps and its model does not read.
    | {"dropout", "drop_path_rate", "initializer_factor"}
    # An encoder has no words.
    | {"tie_word_embeddings", "pad_token_id", "is_decoder"}
)

_TENSORS: dict[str, tuple[str | int, ...]] = {
    "embeddings.cls_token": (1, 1, "hidden"),
    "embeddings.position_embeddings": (1, "positions", "hidden"),
    "embeddings.patch_embeddings.projection.weight": ("hidden", 3, "patch", "patch"),
    "embeddings.patch_embeddings.projection.bias": ("hidden",),
    f"{_LAYER}layernorm_before.weight": ("hidden",),
    f"{_LAYER}attention.q_proj.weight": ("hidden", "hidden"),
    f"{_LAYER}attention.k_proj.weight": ("hidden", "hidden"),
    f"{_LAYER}attention.v_proj.weight": ("hidden", "hidden"),
    f"{_LAYER}attention.projection_layer.weight": ("hidden", "hidden"),
    f"{_LAYER}attention.projection_layer.bias": ("hidden",),
    f"{_LAYER}lambda_1": ("hidden",),
    f"{_LAYER}layernorm_after.weight": ("hidden",),
    f"{_LAYER}mlp.fc1.weight": ("ffn", "hidden"),
    f"{_LAYER}mlp.fc1.bias": ("ffn",),
    f"{_LAYER}mlp.fc2.weight": ("hidden", "ffn"),
    f"{_LAYER}mlp.fc2.bias": ("hidden",),
    f"{_LAYER}lambda_2": ("hidden",),
}
"""What both kinds have."""

_6B = Family(
    model_type="internvl_vision",
    keys=(
        *_COMPUTED,
        # transformers' norms of queries and keys have 1e-6 whatever this key says, InternViT's own
        # code takes it for them too: only with this value both compute the same.
        Fixed("layer_norm_eps", (1e-6,), 1e-6),
        Fixed("norm_type", ("rms_norm",), "layer_norm"),
        Fixed("use_qk_norm", (True,), False),
        Fixed("attention_bias", (False,), False),
    ),
    ignored=_IGNORED,
    tensors=_TENSORS
    | {f"{_LAYER}attention.{name}_norm.weight": ("hidden",) for name in ("q", "k")},
    sizes=sizes,
    optional=lambda vision: frozenset(),
)

_300M = Family(
    model_type="internvl_vision",
    keys=(
        *_COMPUTED,
        Fixed("norm_type", ("layer_norm",), "layer_norm"),
        Fixed("use_qk_norm", (False,), False),
        Fixed("attention_bias", (True,), False),
    ),
    ignored=_IGNORED,
    tensors=_TENSORS
    | {f"{_LAYER}attention.{name}_proj.bias": ("hidden",) for name in ("q", "k", "v")}
    | {f"{_LAYER}layernorm_{place}.bias": ("hidden",) for place in ("before", "after")},
    sizes=sizes,
    optional=lambda vision: frozenset(),
)

INTERN_VIT_6B = Layout(_6B, joined(f"{_LAYER}attention.", ["weight"]))
INTERN_VIT_300M = Layout(_300M, joined(f"{_LAYER}attention.", ["weight", "bias"]))
