"""The recipe: one frozen dataclass per recipe group, those of the model in `model_schema.py`. No torch.

A field without a default must be stated by a recipe file. `docs/recipes.md` explains how the YAML
groups map onto these classes; `rules.py` runs the rules that span several fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from nvlm_train.config.model_schema import ModelConfig

RECIPE_FORMAT = 1
"""Grows when a field changes its meaning or its name; `load.py` refuses others."""

TrainablePart = Literal["projector", "cross_attention", "language_model"]
RecomputedPart = Literal["norms", "mlp", "attention"]
Recompute = Literal["none", "full"] | tuple[RecomputedPart, ...]
TileTags = Literal["none", "1d", "2d_grid", "2d_bbox"]


# ---- stages ----


@dataclass(frozen=True)
class TilingConfig:
    """Tiling cuts an image of any size into tiles (dynamic high resolution; NVLM 1.0, section 4.1)."""

    max_tiles: int = 6
    """An image is cut into at most this many regular tiles; 1 squashes it to one tile. [tiles]"""
    thumbnail: bool = True
    """The whole image follows as one more tile, last, when it has more than one."""
    tags: TileTags = "1d"
    """Each tile is named in the text: not at all, by number, by column and row, or by its box."""
    tag_tokens: Literal["joined", "separate"] = "joined"
    """A tag is tokenised with the text around it, as in NVIDIA's code for Hugging Face, or by itself, as in
    the released training code; Qwen2 has a token for `><`, so `<Image><tile_1>` differs."""


@dataclass(frozen=True)
class BatchConfig:
    """The batch is what one optimizer step trains on."""

    size: int
    """A step trains on this many samples or packs, over all data-parallel ranks. [`unit`]"""
    unit: Literal["samples", "packs"] = "samples"
    """`size` counts these: samples are the paper's way, packs are packed sequences."""
    window: int = 1024
    """Packs are made among this many samples when `unit` is `packs`. [samples]"""
    max_tiles_per_pack: int | None = None
    """A pack has at most this many tiles; null bounds its tokens alone. [tiles]"""


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer is AdamW with linear warm-up and cosine decay (NVLM 1.0, Tables 10 and 11)."""

    lr: float
    """The learning rate reaches this at the end of the warm-up. [per step]"""
    min_lr: float
    """The learning rate has fallen to this at the stage's last step. [per step]"""
    warmup_steps: int
    """The learning rate rises linearly over this many steps. [steps]"""
    weight_decay: float = 0.1
    """Weights decay by this times the learning rate; norms, biases and gates do not. [none]"""
    beta1: float = 0.9
    """The first moment, the gradient's running mean, keeps this share. [per step]"""
    beta2: float = 0.95
    """The second moment, the running mean of squares, keeps this share. [per step]"""
    eps: float = 1e-8
    """Adam adds this to the root of the second moment. [none]"""
    clip_grad: float = 10.0
    """A gradient whose L2 norm over all trained parameters is larger is scaled down to it. [none]"""


@dataclass(frozen=True)
class ParallelConfig:
    """The layout of one stage over ranks; data parallelism is what remains of the world."""

    tensor: int = 1
    """This many ranks share each layer. [ranks]"""
    pipeline: int = 1
    """The layers are cut into this many pipeline stages. [ranks]"""
    sequence_parallel: bool = False
    """Tensor-parallel ranks also share the sequence where layers are not cut."""
    distributed_optimizer: bool = True
    """Data-parallel ranks share the optimizer's state; otherwise each holds all of it."""
    overlap_grad_reduce: bool = True
    """Data-parallel ranks reduce gradients while a step's last backward pass runs."""
    overlap_param_gather: bool = True
    """Those that share the optimizer's state gather weights while the next step's first forward pass runs."""
    recompute: Recompute = "none"
    """The backward pass makes again what was not kept: nothing, whole layers, or these parts of a layer."""
    max_tiles_in_flight: int = 256
    """At most this many are encoded before one run of the pipeline schedule, per model replica. [tiles]"""


@dataclass(frozen=True)
class StageConfig:
    """A training stage says what trains, on which data, for how long, and how it is laid out."""

    trainable: tuple[TrainablePart, ...]
    """These parts train; those that the architecture lacks are passed over: D has no cross_attention."""
    blend: str
    """A data recipe is named here: a file in data_recipes/ without .yaml, or a path to one."""
    steps: int
    """The stage makes this many optimizer steps. [steps]"""
    sequence_length: int
    """A sample is cut at this many tokens; image tokens are included. [tokens]"""
    batch: BatchConfig
    optimizer: OptimizerConfig
    pack_length: int | None = None
    """A pack, one microbatch, holds whole samples of at most this many tokens in all; null:
    `sequence_length`. [tokens]"""
    tiling: TilingConfig = field(default_factory=TilingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    system_message: str | None = None
    """Samples without a system turn get this one; null writes none."""
    prompts: Literal["pretrain", "sft"] = "sft"
    """Captions, VQA and OCR records get prompts of this family."""
    hidden_dropout: float = 0.0
    """Words and each branch of the residual stream are dropped so often, image features never.
    [probability]"""
    attention_dropout: float = 0.0
    """Weights of self- and cross-attention are dropped so often. [probability]"""


# ---- the run ----


@dataclass(frozen=True)
class LoaderConfig:
    """The loader reads samples in background threads and deals with those that cannot be read."""

    data_root: str = "."
    """Relative source paths in blends start here."""
    index_dir: str | None = None
    """Indexes lie here, or beside the shards when null. Remote or read-only shards need it."""
    workers: int = 1
    """A rank decodes in this many threads; 0 decodes in the training thread. [threads]"""
    prefetch_steps: int = 2
    """At most this many steps are made ahead of the one that trains. [steps]"""
    prefetch_gib: float = 8.0
    """Fewer are made ahead when their pixels and those of the next step take more than this. [GiB]"""
    cache_dir: str | None = None
    """Copies of remote shards and indexes lie here, on a node's disk; null reads by range."""
    cache_gib: float = 100.0
    """The copies take at most this; the least recently used ones make room. [GiB]"""
    read_attempts: int = 5
    """A read that fails for a reason which may pass is tried this many times. [attempts]"""
    max_skipped_fraction: float = 0.001
    """Training stops when a larger share of the samples drawn so far could not be used. [fraction]"""
    max_image_pixels: int = 178_956_970
    """Larger images are refused before they are decoded (decompression bombs). [pixels]"""


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints are saved every so many steps, and at the end of each stage."""

    interval_steps: int = 500
    """A checkpoint is saved after each multiple of this, and at the stage's end. [steps]"""
    keep_last: int = 2
    """This many of the newest checkpoints stay. [checkpoints]"""
    keep_stage_ends: bool = False
    """What each stage ended with stays, too."""
    asynchronous: bool = True
    """Files are written by threads while training goes on."""
    max_failed_saves: int = 0
    """This many saves in a row may fail before training stops; a stage's last must not. [saves]"""


@dataclass(frozen=True)
class TrackingConfig:
    """metrics.jsonl is always written; wandb is fed on request."""

    wandb: Literal["off", "offline", "online"] = "off"
    """wandb gets nothing, files to be synced later, or the run as it goes."""
    project: str = "nvlm-train"
    """The run belongs to this project of wandb."""
    entity: str | None = None
    """The run belongs to this wandb user or team; null takes the account's default."""
    log_every: int = 1
    """Terminal and wandb show one step in this many; metrics.jsonl has all of them. [steps]"""
    num_examples: int = 4
    """wandb shows answers to this many samples of a stage, with their tiles. [samples]"""
    examples_every: int | None = None
    """Such tables are made this far apart; null makes one at the end of each stage. [steps]"""
    example_tokens: int = 32
    """An answer has at most this many tokens; each is a forward pass. [tokens]"""


@dataclass(frozen=True)
class HealthConfig:
    """A run does this by itself when something goes wrong. `docs/health.md` explains each part."""

    max_non_finite_steps: int = 3
    """This many steps in a row without a finite loss and gradient norm are left out; one more stops the run.
    [steps]"""
    spike: Literal["off", "warn", "rollback"] = "warn"
    """`rollback` goes back to the newest checkpoint and leaves out the steps around the spike."""
    spike_window: int = 128
    """Losses of this many steps say what is usual; before a quarter of them nothing is a spike. [steps]"""
    spike_threshold: float = 10.0
    """A spike lies this many scaled MADs above the window's median. [standard deviations]"""
    spike_skip_steps: int = 10
    """A rollback leaves out this many steps on either side of the spike. [steps]"""
    max_rollbacks: int = 3
    """A run goes back at most this often; one more spike stops it. [rollbacks]"""
    hang_factor: float = 10.0
    """A step is a hang when it takes longer than this times the median step. [times]"""
    hang_floor_seconds: float = 300.0
    """A step is no hang before it has taken this long. [seconds]"""
    hang_grace_seconds: float = 1800.0
    """A stage's first steps, saving and evaluation are no hang before this. [seconds]"""
    straggler_interval_steps: int = 50
    """Ranks compare the times of this many steps, summed. [steps]"""
    straggler_threshold: float = 1.2
    """A rank is slow when its own time is this many times the median of its peers'. [times]"""
    straggler_patience: int = 3
    """A rank is a straggler when it was slowest, and slow, so often in a row. [comparisons]"""
    heartbeat_seconds: float = 10.0
    """RUN_DIR/heartbeat.json is written this far apart. [seconds]"""


@dataclass(frozen=True)
class Recipe:
    """A recipe is everything that decides a run. Started again in the same run directory, it continues."""

    name: str
    """The run is called this, by wandb and in the default of `run_dir`."""
    run_dir: str
    """Everything that the run writes lies in this directory, which all ranks share."""
    seed: int
    """Initial weights, the order of samples and dropout follow from this number. [none]"""
    precision: Literal["fp32", "bf16"]
    """Weights and activations have this type; gradients and the optimizer's state are fp32."""
    schedule: tuple[str, ...]
    """These stages run, in this order."""
    stages: Mapping[str, StageConfig]
    model: ModelConfig
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    format: int = RECIPE_FORMAT
    """The recipe's files have this format. State it, so that later versions know how to read them. [none]"""
