"""SigLIP's vision encoder as transformers has it; SigLIP 2 of a fixed size is the same model."""

from __future__ import annotations

from collections.abc import Mapping

from nvlm_train.config.model_schema import VisionConfig
from nvlm_train.convert.encoders.layout import Layout, joined, sizes
from nvlm_train.convert.family import Family
from nvlm_train.convert.ignored import BOOKKEEPING, GENERATION
from nvlm_train.convert.keys import Fixed, Sized, edge
from nvlm_train.geometry import patches_per_side

_LAYER = "encoder.layers.{n}."
_TENSORS: dict[str, tuple[str | int, ...]] = {
    "embeddings.patch_embedding.weight": ("hidden", 3, "patch", "patch"),
    "embeddings.patch_embedding.bias": ("hidden",),
    "embeddings.position_embedding.weight": ("positions", "hidden"),
    **{
        f"{_LAYER}{name}.{kind}": ("hidden",)
        for name in ("layer_norm1", "layer_norm2")
        for kind in ("weight", "bias")
    },
    **{f"{_LAYER}self_attn.{name}_proj.weight": ("hidden", "hidden") for name in "qkv"},
    **{f"{_LAYER}self_attn.{name}_proj.bias": ("hidden",) for name in "qkv"},
    f"{_LAYER}self_attn.out_proj.weight": ("hidden", "hidden"),
    f"{_LAYER}self_attn.out_proj.bias": ("hidden",),
    f"{_LAYER}mlp.fc1.weight": ("ffn", "hidden"),
    f"{_LAYER}mlp.fc1.bias": ("ffn",),
    f"{_LAYER}mlp.fc2.weight": ("hidden", "ffn"),
    f"{_LAYER}mlp.fc2.bias": ("hidden",),
    "post_layernorm.weight": ("hidden",),
    "post_layernorm.bias": ("hidden",),
}
_HEAD = tuple(
    f"head.{name}"
    for name in (
        "probe", "attention.in_proj_weight", "attention.in_proj_bias", "attention.out_proj.weight",
        "attention.out_proj.bias", "layernorm.weight", "layernorm.bias", "mlp.fc1.weight", "mlp.fc1.bias",
        "mlp.fc2.weight", "mlp.fc2.bias",
    )
)  # fmt: skip
"""The head pools all patches into one vector, for classifiers and for the text tower."""


def _sizes(vision: VisionConfig) -> Mapping[str, int]:
    return {**sizes(vision), "positions": patches_per_side(vision) ** 2}


SIGLIP = Layout(
    Family(
        model_type="siglip_vision_model",
        # Defaults are those of transformers' SiglipVisionConfig.
        keys=(
            Fixed("architectures", (["SiglipVisionModel"], ["SiglipModel"], None), None),
            Sized("num_hidden_layers", "num_layers", 12),
            Sized("hidden_size", "hidden_size", 768),
            Sized("num_attention_heads", "num_heads", 12),
            Sized("intermediate_size", "ffn_hidden_size", 3072),
            Sized("layer_norm_eps", "norm_eps", 1e-6),
            Sized("image_size", "tile_size", 224, read=edge),
            Sized("patch_size", "patch_size", 16, read=edge),
            Fixed("num_channels", (3,), 3),
            Fixed("hidden_act", ("gelu_pytorch_tanh",), "gelu_pytorch_tanh"),
            Fixed("quantization_config", (None,), None),
            Fixed("pruned_heads", ({}, None), None),
            Fixed("is_encoder_decoder", (False,), False),
            Fixed("add_cross_attention", (False,), False),
            Fixed("return_dict", (True,), True),
        ),
        ignored=BOOKKEEPING
        | GENERATION
        # The head's output is not used.
        | {"vision_use_head", "projection_size"}
        # An encoder has no words.
        | {"tie_word_embeddings", "pad_token_id", "is_decoder"},
        tensors=_TENSORS,
        sizes=_sizes,
        optional=lambda vision: frozenset(),
        # transformers before 4.31 stored the positions' numbers.
        harmless=(*_HEAD, "embeddings.position_ids"),
    ),
    joined(f"{_LAYER}self_attn.", ["weight", "bias"]),
)
