"""The recipe's `model` group: sizes, weights on disk, and what connects the encoder to the language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Architecture = Literal["d", "x", "h"]
ChatTemplateName = Literal["qwen2", "yi"]


@dataclass(frozen=True)
class VisionConfig:
    """InternViT-style vision encoder: always frozen, never sharded (NVLM 1.0, section 4.1)."""

    num_layers: int
    hidden_size: int
    num_heads: int
    ffn_hidden_size: int
    tile_size: int
    """Edge of a square tile in pixels (448 in the paper)."""
    patch_size: int
    norm_eps: float = 1e-6
    weights: str | None = None
    """Directory with config.json and model.safetensors (InternVL vision layout), or none for random ones."""
    batch_tiles: int = 8
    """Tiles of one encoder forward. Fixed, so that features do not depend on who computes them."""


@dataclass(frozen=True)
class ProjectorConfig:
    """LayerNorm, Linear, GELU, Linear; no biases on the linears, as released for NVLM-D."""

    ffn_hidden_size: int | None
    """Width between the two linears; none for LayerNorm and one linear (NVLM-X, section 4.5)."""
    norm_eps: float = 1e-5


@dataclass(frozen=True)
class ResamplerConfig:
    """Perceiver resampler behind the projector: for a Flamingo-style baseline; NVLM has none."""

    num_latents: int
    """Tokens that remain of a tile."""
    num_layers: int = 2


@dataclass(frozen=True)
class CrossAttentionConfig:
    """Gated cross-attention in some layers of the language model (NVLM 1.0, sections 4.3 to 4.5)."""

    every: int
    """In layers `every`, 2 `every`, ...: 8 of 80 layers at 72B, 6 of 60 at 34B, so 10 of them."""
    feed_forward: Literal["none", "gated"] = "none"
    """`gated` adds a feed-forward with a gate of its own, as Flamingo has; Figure 3 of NVLM shows none."""


@dataclass(frozen=True)
class LanguageConfig:
    """Qwen2-shaped decoder: GQA, RMSNorm, SwiGLU, RoPE, untied embeddings."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    ffn_hidden_size: int
    vocab_size: int
    """Rows of the embedding table, padding rows included."""
    norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    qkv_bias: bool = True
    init_std: float = 0.014
    weights: str | None = None
    """Directory with config.json and *.safetensors (docs/weights.md), or none for random ones."""


@dataclass(frozen=True)
class TokenizerConfig:
    """A Hugging Face fast tokenizer, the chat template, and the special tokens that it needs."""

    path: str
    """A tokenizer.json, or a directory that holds one."""
    pad: str = "<|endoftext|>"
    turn_start: str = "<|im_start|>"
    turn_end: str = "<|im_end|>"
    template: ChatTemplateName = "qwen2"
    """`yi` for NVLM's 34B models; see `nvlm_train.tokens.TEMPLATES`."""
    thumbnail_tag: str | None = None
    """None for the template's own."""


@dataclass(frozen=True)
class ModelConfig:
    """What is trained. The architecture is a table of routes: see `nvlm_train.routes`."""

    architecture: Architecture
    vision: VisionConfig
    projector: ProjectorConfig
    language: LanguageConfig
    tokenizer: TokenizerConfig
    cross_attention: CrossAttentionConfig | None = None
    """Needed by `x` and `h`, absent from `d`."""
    resampler: ResamplerConfig | None = None
    """For `x` only: cross-attention then reads latents instead of a tile's tokens."""
