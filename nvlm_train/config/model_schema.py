"""The model's part of the recipe: one frozen dataclass per group. No torch, no megatron."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Architecture = Literal["d", "x", "h"]
ChatTemplateName = Literal["qwen2", "yi"]


@dataclass(frozen=True)
class VisionConfig:
    """The vision encoder is always frozen and never sharded (NVLM 1.0, section 4.1)."""

    num_layers: int
    """The encoder has this many transformer layers. [layers]"""
    hidden_size: int
    """The encoder's residual stream has this width. [channels]"""
    num_heads: int
    """Attention has this many heads; they divide `hidden_size`. [heads]"""
    ffn_hidden_size: int
    """The MLP has this width between its two linears. [channels]"""
    tile_size: int
    """A square tile has this edge; it is 448 in the paper. [pixels]"""
    patch_size: int
    """A square patch, which becomes one token, has this edge. [pixels]"""
    kind: str = "intern_vit_6b"
    """This row of `nvlm_train/vision/encoder.py` computes the features, whatever its sizes."""
    norm_eps: float = 1e-6
    """The norms add this to the variance. [none]"""
    weights: str | None = None
    """A directory with config.json and safetensors files is named here; null makes random weights."""
    batch_tiles: int | None = None
    """A forward pass takes this many tiles, whoever computes it; null: by its memory, 16 at most. [tiles]"""


@dataclass(frozen=True)
class ProjectorConfig:
    """The projector is LayerNorm, Linear, GELU, Linear, without biases on the linears, as NVLM-D's is."""

    ffn_hidden_size: int | None
    """The two linears have this width between them; null leaves one (NVLM-X, section 4.5). [channels]"""
    norm_eps: float = 1e-5
    """The LayerNorm adds this to the variance. [none]"""
    weights: str | None = None
    """A directory of NVLM-D 72B, which has `mlp1`, is named here; null makes random weights."""


@dataclass(frozen=True)
class ResamplerConfig:
    """A Perceiver resampler follows the projector in a Flamingo-style baseline; NVLM has none."""

    num_latents: int
    """This many tokens remain of a tile. [tokens]"""
    num_layers: int = 2
    """The resampler has this many layers of attention and feed-forward. [layers]"""


@dataclass(frozen=True)
class CrossAttentionConfig:
    """Some layers of the language model have gated cross-attention (NVLM 1.0, sections 4.3 to 4.5)."""

    every: int
    """Every layer whose number this divides has it: 8 at 72B and 6 at 34B give 10 such layers. [layers]"""
    feed_forward: Literal["none", "gated"] = "none"
    """`gated` adds a feed-forward with a gate of its own, as Flamingo has; Figure 3 of NVLM shows none."""


@dataclass(frozen=True)
class RopeScalingConfig:
    """RoPE turns more slowly than `rope_theta` says, for texts longer than the first ones trained on."""

    kind: Literal["linear", "llama3"]
    """`linear` turns every channel `factor` times more slowly; `llama3` spares the fast ones (Llama 3.1)."""
    factor: float
    """The slowed channels turn this many times more slowly. [times]"""
    low_freq_factor: float = 1.0
    """`llama3` slows channels fully that turn less often than this in the original length. [turns]"""
    high_freq_factor: float = 4.0
    """`llama3` leaves channels alone that turn more often than this in it. [turns]"""
    original_max_positions: int = 8192
    """`llama3` takes this as the original length, before the stretching. [tokens]"""


@dataclass(frozen=True)
class LanguageConfig:
    """The language model is a decoder as Qwen2, Qwen3 and Llama are: GQA, RMSNorm, SwiGLU, RoPE.

    What the families differ in are fields; `nvlm_train/convert/language.py` lists the families.
    """

    num_layers: int
    """The decoder has this many layers; `parallel.pipeline` divides them. [layers]"""
    hidden_size: int
    """The decoder's residual stream has this width. [channels]"""
    num_heads: int
    """Attention has this many query heads; `parallel.tensor` divides them. [heads]"""
    num_kv_heads: int
    """Attention has this many heads of keys and values (GQA); they divide `num_heads`. [heads]"""
    ffn_hidden_size: int
    """The MLP has this width between its linears. [channels]"""
    vocab_size: int
    """The embedding table has this many rows, padding included; `parallel.tensor` divides them. [tokens]"""
    num_tokens: int | None = None
    """Rows from this number on are padding: never predicted, never trained; null has none. [tokens]"""
    norm_eps: float = 1e-6
    """The norms add this to the mean square. [none]"""
    head_dim: int | None = None
    """A head has this many channels; null divides `hidden_size` by `num_heads`. [channels]"""
    rope_theta: float = 1_000_000.0
    """Rotary position frequencies have this base. [none]"""
    rope_scaling: RopeScalingConfig | None = None
    """The group may slow RoPE down; null leaves it as `rope_theta` says."""
    qkv_bias: bool = True
    """The linears of queries, keys and values have a bias: Qwen2's do, Llama's and Qwen3's do not."""
    qk_norm: bool = False
    """An RMSNorm is over each head's channels of queries and keys, before RoPE: Qwen3 has it."""
    tied_embeddings: bool = False
    """The output layer multiplies with the embedding table instead of a table of its own."""
    init_std: float = 0.014
    """Random weights have this standard deviation, also outside the language model. [none]"""
    weights: str | None = None
    """A directory with config.json and *.safetensors is named here; null makes random weights."""


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer is a Hugging Face fast one; a chat template and special tokens belong to it."""

    path: str
    """The tokenizer.json, or a directory that holds one, is named here."""
    pad: str = "<|endoftext|>"
    """Packs are filled up with this token, which is never trained."""
    turn_start: str = "<|im_start|>"
    """A turn of the chat template starts with this control token."""
    turn_end: str = "<|im_end|>"
    """A turn, and so an answer, ends with this control token."""
    template: ChatTemplateName = "qwen2"
    """Chats are written in this form, `yi` for NVLM's 34B models: see `nvlm_train.tokens.TEMPLATES`."""
    thumbnail_tag: str | None = None
    """The thumbnail is tagged with this text; null takes the template's own."""


@dataclass(frozen=True)
class ModelConfig:
    """The model that is trained. Its architecture is a table of routes: see `nvlm_train.routes`."""

    architecture: Architecture
    """A row of the table of routes is chosen here: NVLM-D, NVLM-X or NVLM-H."""
    vision: VisionConfig
    projector: ProjectorConfig
    language: LanguageConfig
    tokenizer: TokenizerConfig
    cross_attention: CrossAttentionConfig | None = None
    """`x` and `h` need this group, and `d` must not have it."""
    resampler: ResamplerConfig | None = None
    """Only `x` may have it: cross-attention then reads latents instead of a tile's tokens."""
