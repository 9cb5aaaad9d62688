"""transformers' names of the sizes of a language model and of a vision encoder."""

from __future__ import annotations

from typing import Any

import torch

from nvlm_train.config.model_schema import LanguageConfig, VisionConfig
from tests.convert.files.models import randomise


def sizes(language: LanguageConfig) -> dict[str, Any]:
    """Returns arguments of Qwen2Config and LlamaConfig. The embedding tables are not tied."""
    return {
        "vocab_size": language.vocab_size,
        "hidden_size": language.hidden_size,
        "num_hidden_layers": language.num_layers,
        "num_attention_heads": language.num_heads,
        "num_key_value_heads": language.num_kv_heads,
        "intermediate_size": language.ffn_hidden_size,
        "rms_norm_eps": language.norm_eps,
        "rope_theta": language.rope_theta,
        "tie_word_embeddings": False,
    }


KINDS: dict[str, dict[str, Any]] = {
    "intern_vit_6b": {"use_qk_norm": True, "norm_type": "rms_norm", "attention_bias": False},
    "intern_vit_300m": {"use_qk_norm": False, "norm_type": "layer_norm", "attention_bias": True},
}
"""What InternVLVisionConfig says of each kind of encoder."""


def encoder_sizes(vision: VisionConfig) -> dict[str, Any]:
    """Returns arguments of InternVLVisionConfig, of the recipe's kind."""
    return KINDS[vision.kind] | {
        "num_hidden_layers": vision.num_layers,
        "hidden_size": vision.hidden_size,
        "num_attention_heads": vision.num_heads,
        "intermediate_size": vision.ffn_hidden_size,
        "image_size": vision.tile_size,
        "patch_size": vision.patch_size,
    }


def transformers_encoder(vision: VisionConfig) -> torch.nn.Module:
    """Builds transformers' encoder of the recipe's kind, with weights away from zero and one everywhere."""
    return randomise(_initialised_encoder(vision))


def _initialised_encoder(vision: VisionConfig) -> torch.nn.Module:
    if vision.kind == "siglip":
        from transformers import SiglipVisionConfig, SiglipVisionModel

        return SiglipVisionModel(SiglipVisionConfig(**siglip_sizes(vision)))
    from transformers.models.internvl.configuration_internvl import InternVLVisionConfig
    from transformers.models.internvl.modeling_internvl import InternVLVisionModel

    return InternVLVisionModel(InternVLVisionConfig(**encoder_sizes(vision)))


def siglip_sizes(vision: VisionConfig) -> dict[str, Any]:
    """Returns arguments of SiglipVisionConfig."""
    return {
        "num_hidden_layers": vision.num_layers,
        "hidden_size": vision.hidden_size,
        "num_attention_heads": vision.num_heads,
        "intermediate_size": vision.ffn_hidden_size,
        "image_size": vision.tile_size,
        "patch_size": vision.patch_size,
        "layer_norm_eps": vision.norm_eps,
    }
