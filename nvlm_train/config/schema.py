"""The recipe: one frozen dataclass per recipe group, the whole of it on this page. No torch, no megatron.

A field without a default must be stated by a recipe file. `docs/recipes.md` explains how the YAML
groups map onto these classes; `rules.py` holds the rules that span several fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

RECIPE_FORMAT = 1
"""Grows when a field changes its meaning or its name; `load.py` refuses others."""

TrainablePart = Literal["projector", "cross_attention", "language_model"]
TileTags = Literal["none", "1d", "2d_grid", "2d_bbox"]

Architecture = Literal["d", "x", "h"]
ChatTemplateName = Literal["qwen2", "yi"]


# ---- model ----


@dataclass(frozen=True)
class VisionConfig:
    """The vision encoder: always frozen, never sharded (NVLM 1.0, section 4.1)."""

    num_layers: int
    hidden_size: int
    num_heads: int
    ffn_hidden_size: int
    tile_size: int
    """Edge of a square tile in pixels (448 in the paper)."""
    patch_size: int
    kind: str = "intern_vit_6b"
    """Which encoder computes the features: a row of `nvlm_train/vision/encoder.py`, whatever its sizes."""
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
class RopeScalingConfig:
    """RoPE turned more slowly than `rope_theta` says, for texts longer than the first ones trained on."""

    kind: Literal["linear", "llama3"]
    """`linear` turns every channel `factor` times more slowly; `llama3` spares the fast ones (Llama 3.1)."""
    factor: float
    low_freq_factor: float = 1.0
    """For `llama3`: channels that turn fewer times than this in the original length are slowed fully."""
    high_freq_factor: float = 4.0
    """For `llama3`: channels that turn more often than this are left as they are."""
    original_max_positions: int = 8192
    """For `llama3`: tokens of the longest text before the stretching."""


@dataclass(frozen=True)
class LanguageConfig:
    """A decoder as Qwen2, Qwen3 and Llama have it: GQA, RMSNorm, SwiGLU, RoPE.

    What the families differ in are fields; `nvlm_train/convert/language.py` lists the families.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    ffn_hidden_size: int
    vocab_size: int
    """Rows of the embedding table, padding rows included."""
    norm_eps: float = 1e-6
    head_dim: int | None = None
    """Channels of a head; none for `hidden_size / num_heads`."""
    rope_theta: float = 1_000_000.0
    rope_scaling: RopeScalingConfig | None = None
    qkv_bias: bool = True
    """Biases on queries, keys and values: Qwen2 has them, Llama and Qwen3 do not."""
    qk_norm: bool = False
    """An RMSNorm over each head's channels of queries and keys, before RoPE: Qwen3 has it."""
    tied_embeddings: bool = False
    """The output layer multiplies with the embedding table instead of a table of its own."""
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


# ---- stages ----


@dataclass(frozen=True)
class TilingConfig:
    """Dynamic high resolution (NVLM 1.0, section 4.1)."""

    max_tiles: int = 6
    """Most regular tiles of an image; 1 squashes it to one tile."""
    thumbnail: bool = True
    """Append the whole image as one more tile, last, when it has more than one."""
    tags: TileTags = "1d"


@dataclass(frozen=True)
class BatchConfig:
    """One optimizer step. `samples` counts samples (the paper's way), `packs` counts packed sequences."""

    size: int
    unit: Literal["samples", "packs"] = "samples"
    window: int = 1024
    """Samples among which packs are made when unit is packs."""
    max_tiles_per_pack: int | None = None
    """Bound on the tiles of a pack, besides that on its tokens; none for tokens alone."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay (NVLM 1.0, Tables 10 and 11)."""

    lr: float
    min_lr: float
    warmup_steps: int
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_grad: float = 10.0


@dataclass(frozen=True)
class ParallelConfig:
    """Layout of one stage; data parallelism is what remains of the world."""

    tensor: int = 1
    pipeline: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False
    recompute: Literal["none", "selective", "full"] = "none"
    max_tiles_in_flight: int = 256
    """Bound on the tiles encoded before one run of the pipeline schedule (a round), per model replica."""


@dataclass(frozen=True)
class StageConfig:
    """One training stage: what trains, on which data, how long, laid out how."""

    trainable: tuple[TrainablePart, ...]
    """Parts that the architecture does not have are passed over: D has no cross_attention."""
    blend: str
    """A data recipe: name of a file in data_recipes/ without .yaml, or a path to one."""
    steps: int
    sequence_length: int
    """Tokens of a pack, image tokens included."""
    batch: BatchConfig
    optimizer: OptimizerConfig
    tiling: TilingConfig = field(default_factory=TilingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    system_message: str | None = None
    prompts: Literal["pretrain", "sft"] = "sft"
    """Prompt family for captions, VQA and OCR records."""
    hidden_dropout: float = 0.0
    """On words and on every branch that is added to the residual stream; never on image features."""
    attention_dropout: float = 0.0
    """On the weights of self- and cross-attention."""


# ---- the run ----


@dataclass(frozen=True)
class LoaderConfig:
    """Reading: background threads and what is done with samples that cannot be read."""

    data_root: str = "."
    """Relative source paths in blends start here."""
    index_dir: str | None = None
    """Where indexes lie; none for beside the shards. Needed for remote or read-only shards."""
    workers: int = 1
    """Decoding threads of a rank; 0 decodes in the training thread."""
    prefetch_steps: int = 2
    """Most steps made ahead of the one that trains."""
    prefetch_gib: float = 8.0
    """Fewer are made ahead when their pixels and those of the next step take more than this (GiB)."""
    cache_dir: str | None = None
    """Directory on a node's disk for copies of remote shards and their indexes; none reads by range."""
    cache_gib: float = 100.0
    """Limit on the copies (GiB); the least recently used ones make room."""
    read_attempts: int = 5
    """How often a read is tried that fails for a reason which may pass."""
    max_skipped_fraction: float = 0.001
    """Training stops when more than this share of the samples drawn so far could not be used."""
    max_image_pixels: int = 178_956_970
    """Larger images are refused before they are decoded (decompression bombs)."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving: every so many steps, and at the end of each stage."""

    interval_steps: int = 500
    keep_last: int = 2
    keep_stage_ends: bool = False
    """Besides the last ones, keep what each stage ended with."""
    asynchronous: bool = True
    max_failed_saves: int = 0
    """Saves in a row that may fail (disk full) before training stops. A stage's last one must succeed."""


@dataclass(frozen=True)
class TrackingConfig:
    """metrics.jsonl is always written; wandb on request."""

    wandb: Literal["off", "offline", "online"] = "off"
    project: str = "nvlm-train"
    entity: str | None = None
    log_every: int = 1
    num_examples: int = 4
    """Samples of a stage whose answers wandb shows with their tiles; 0 for none."""
    examples_every: int | None = None
    """Steps between two such tables; none for one at the end of each stage."""
    example_tokens: int = 32
    """Longest answer of an example; each token is a forward pass."""


@dataclass(frozen=True)
class HealthConfig:
    """What is done when a run falls ill while nobody looks. `docs/health.md` explains each part."""

    max_non_finite_steps: int = 3
    """Steps in a row whose loss or gradient norm is not finite that are left out; one more stops the
    run, and 0 stops it at the first."""
    spike: Literal["off", "warn", "rollback"] = "warn"
    """`rollback` goes back to the newest checkpoint and leaves out the steps around the spike."""
    spike_window: int = 128
    """Steps whose losses say what is usual; a quarter of them must be there before anything is a spike."""
    spike_threshold: float = 10.0
    """A spike lies so many scaled MADs (robust standard deviations) above the window's median."""
    spike_skip_steps: int = 10
    """Steps left out on either side of the spike after a rollback."""
    max_rollbacks: int = 3
    """In a run; one more spike stops it."""
    hang_factor: float = 10.0
    """A step that takes so many times the median step is a hang,"""
    hang_floor_seconds: float = 300.0
    """but not before so many seconds,"""
    hang_grace_seconds: float = 1800.0
    """and so many where long waits are usual: a stage's first steps, saving, evaluation."""
    straggler_interval_steps: int = 50
    """Steps over which the ranks' own times are summed before they are compared."""
    straggler_threshold: float = 1.2
    """A rank is slow when its own time is so many times the median of all ranks',"""
    straggler_patience: int = 3
    """and a straggler when it is the slowest and slow so many comparisons in a row."""
    heartbeat_seconds: float = 10.0
    """Between two writes of RUN_DIR/heartbeat.json."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run. Starting the same recipe in the same run directory continues it."""

    name: str
    run_dir: str
    seed: int
    precision: Literal["fp32", "bf16"]
    schedule: tuple[str, ...]
    """Names of stages in the order they run."""
    stages: Mapping[str, StageConfig]
    model: ModelConfig
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    format: int = RECIPE_FORMAT
    """Of the recipe's files. State it in your own experiments, so that a later version knows how to read
    them."""
