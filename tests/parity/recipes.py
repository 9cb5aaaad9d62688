"""Small recipes and made-up batches for parity tests. No recipe file, no shard: numbers only."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from nvlm_train.batch import Microbatch, RankShare, Round, SampleInfo, StepBatch
from nvlm_train.config.model_schema import (
    LanguageConfig,
    ModelConfig,
    ProjectorConfig,
    TokenizerConfig,
    VisionConfig,
)
from nvlm_train.config.schema import (
    BatchConfig,
    OptimizerConfig,
    ParallelConfig,
    Recipe,
    StageConfig,
)
from nvlm_train.geometry import tokens_per_tile

SEQUENCE_LENGTH = 96
VISION = VisionConfig(
    num_layers=2, hidden_size=32, num_heads=4, ffn_hidden_size=64, tile_size=32, patch_size=8,
    batch_tiles=4,
)  # fmt: skip
LANGUAGE = LanguageConfig(
    num_layers=4, hidden_size=64, num_heads=4, num_kv_heads=2, ffn_hidden_size=128, vocab_size=256,
    rope_theta=10_000.0, init_std=0.08,
)  # fmt: skip
MODEL = ModelConfig(
    "d", VISION, ProjectorConfig(ffn_hidden_size=96), LANGUAGE, TokenizerConfig(path="unused")
)


def stage(
    parallel: ParallelConfig,
    trainable: tuple[str, ...] = ("projector", "language_model"),
    lr: float = 1e-3,
    hidden_dropout: float = 0.0,
    attention_dropout: float = 0.0,
) -> StageConfig:
    """Returns a stage of the small model in some layout."""
    return StageConfig(
        trainable=trainable,  # type: ignore[arg-type]
        blend="unused",
        steps=10,
        sequence_length=SEQUENCE_LENGTH,
        batch=BatchConfig(size=4, unit="packs"),
        optimizer=OptimizerConfig(lr=lr, min_lr=lr, warmup_steps=0, clip_grad=1.0),
        parallel=parallel,
        hidden_dropout=hidden_dropout,
        attention_dropout=attention_dropout,
    )


def recipe(
    parallel: ParallelConfig,
    model: ModelConfig = MODEL,
    sequence_length: int = SEQUENCE_LENGTH,
    pack_length: int | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    **changes: object,
) -> Recipe:
    """Returns a one-stage recipe around `stage`."""
    own = stage(parallel, **changes)  # type: ignore[arg-type]
    own = replace(own, sequence_length=sequence_length, pack_length=pack_length)
    return Recipe(
        name="parity",
        run_dir="unused",
        seed=7,
        precision=precision,
        schedule=("sft",),
        stages={"sft": own},
        model=model,
    )


def pack(
    layout: list[tuple[int, int]], seed: int, trained: str = "some"
) -> tuple[Microbatch, torch.Tensor]:
    """Returns a pack of samples given as (text tokens, tiles), and the pixels of its tiles.

    Args:
        layout: per sample its text tokens and tiles; a tile takes tokens_per_tile more tokens.
        seed: of ids and pixels.
        trained: "some" trains the last third of each sample, "none" trains nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    per_tile = tokens_per_tile(VISION)
    ids = torch.zeros(SEQUENCE_LENGTH, dtype=torch.int64)
    image_positions, labels, bounds, position = [], [], [0], 0
    for number, (text, tiles) in enumerate(layout):
        length = text + tiles * per_tile
        ids[position : position + length] = torch.randint(3, 250, (length,), generator=generator)
        image_positions += list(range(position + 1, position + 1 + tiles * per_tile))
        if trained == "some":
            first = position + max(length - text // 3, 1 + tiles * per_tile) - 1
            labels += [(p, number) for p in range(first, position + length - 1)]
        position += length
        bounds.append(position)
    assert position <= SEQUENCE_LENGTH
    bounds += [SEQUENCE_LENGTH] if position < SEQUENCE_LENGTH else []
    label_positions = torch.tensor([p for p, _ in labels], dtype=torch.int64)
    num_tiles = sum(tiles for _, tiles in layout)
    microbatch = Microbatch(
        token_ids_S=ids,
        image_positions=torch.tensor(image_positions, dtype=torch.int64),
        label_positions_L=label_positions,
        label_ids_L=ids[label_positions + 1],
        label_samples_L=torch.tensor([sample for _, sample in labels], dtype=torch.int64),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        samples=tuple(SampleInfo(n % 2, "made-up", str(n)) for n in range(len(layout))),
        num_tiles=num_tiles,
    )
    edge = VISION.tile_size
    pixels = torch.randint(
        0, 256, (num_tiles, 3, edge, edge), dtype=torch.uint8, generator=generator
    )
    return microbatch, pixels


MIXED = [
    [(20, 3), (12, 1), (15, 0)],  # multi-tile, one tile, text only, in one pack
    [(30, 7)],  # seven tiles: more than one encoder batch
    [(18, 0), (25, 0)],  # a text-only pack between packs with images
    [(40, 2), (10, 4)],
]
TEXT_ONLY = [[(30, 0), (20, 0)], [(40, 0)], [(25, 0)], [(60, 0), (20, 0)]]
STEPS = [MIXED, TEXT_ONLY]
"""A mixed step and an all-text step right after it, which must neither hang nor see stale gradients."""


def step_batch(
    layouts: list[list[tuple[int, int]]], share: RankShare, step: int, rounds: int = 1
) -> StepBatch:
    """Returns this rank's view of a step made of the given packs, cut into rounds."""
    return deal([pack(each, 100 * step + n) for n, each in enumerate(layouts)], share, step, rounds)


def deal(
    packs: list[tuple[Microbatch, torch.Tensor]], share: RankShare, step: int, rounds: int
) -> StepBatch:
    """Returns this rank's packs of a step, cut into rounds."""
    per_rank = len(packs) // share.dp_size
    own = packs[share.dp_rank * per_rank : (share.dp_rank + 1) * per_rank]
    size = max(len(own) // rounds, 1)
    groups = [own[start : start + size] for start in range(0, len(own), size)]
    return StepBatch(step, tuple(_round(group, share) for group in groups), ())


def _round(group: list[tuple[Microbatch, torch.Tensor]], share: RankShare) -> Round:
    pixels = torch.cat([tiles for _, tiles in group])
    base, extra = divmod(len(pixels), share.replica_size)
    split = tuple(base + (rank < extra) for rank in range(share.replica_size))
    start = sum(split[: share.replica_rank])
    own = pixels[start : start + split[share.replica_rank]]
    return Round(tuple(microbatch for microbatch, _ in group), split, own)


def with_parallel(base: ParallelConfig, **changes: object) -> ParallelConfig:
    return replace(base, **changes)  # type: ignore[arg-type]
