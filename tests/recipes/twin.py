"""A recipe of real size made small enough to train in a test: sizes shrink by one rule, the rest stays.

What a recipe decides stays: the architecture, the kind of encoder, what trains, rates, tiling and
tags, precision, grouped heads, tied or separate tables, biases, the form of chats, dropout.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from nvlm_train.config.model_schema import LanguageConfig, ModelConfig, VisionConfig
from nvlm_train.config.schema import ParallelConfig, Recipe, StageConfig

RANKS = 4
"""A test has this many processes."""
HEAD = 8
"""Channels of a head, in the encoder and in the language model."""
LAYERS = 4
VOCABULARY = 512
"""Rows for the tokenizer of `tests/train/smoke.py`, which has up to 501 ids."""


def twin_of(recipe: Recipe, data: Path, run_dir: Path) -> Recipe:
    """Returns the recipe with small sizes and two steps a stage.

    Args:
        recipe: of any size.
        data: what `write_tokenizer` and `make_smoke_data` wrote.
        run_dir: where the twin runs.
    """
    return replace(
        recipe,
        run_dir=str(run_dir),
        model=_model(recipe.model, data),
        stages={name: _stage(stage, data) for name, stage in recipe.stages.items()},
        # As in the smoke recipe: two of the images of its questions do not fit one tile.
        loader=replace(recipe.loader, max_skipped_fraction=0.1),
    )


def world_of(recipe: Recipe) -> int:
    """Returns the smallest world that all layouts of a recipe divide."""
    layouts = (stage.parallel for stage in recipe.stages.values())
    return math.lcm(*(layout.tensor * layout.pipeline for layout in layouts))


def write_tokenizer(data: Path) -> Path:
    """Adds what Yi's chats begin with to the tokenizer of the smoke data."""
    from tokenizers import Tokenizer

    fast = Tokenizer.from_file(str(data / "tokenizer.json"))
    fast.add_special_tokens(["<|startoftext|>"])
    assert fast.get_vocab_size() <= VOCABULARY
    fast.save(str(data / "twins.json"))
    return data / "twins.json"


def _model(model: ModelConfig, data: Path) -> ModelConfig:
    language = _language(model.language)
    between, cross = model.projector.ffn_hidden_size, model.cross_attention
    return replace(
        model,
        vision=_vision(model.vision),
        language=language,
        tokenizer=replace(model.tokenizer, path=str(data / "twins.json")),
        projector=replace(model.projector, ffn_hidden_size=between and language.ffn_hidden_size),
        cross_attention=cross and replace(cross, every=min(cross.every, LAYERS // 2)),
    )


def _language(language: LanguageConfig) -> LanguageConfig:
    """Keeps up to four KV groups, whether a group has an odd number of heads, and the MLP's proportion."""
    groups = min(language.num_kv_heads, RANKS)
    in_group = language.num_heads // language.num_kv_heads
    heads = groups * (in_group if in_group <= 3 else 2 + in_group % 2)
    hidden = heads * HEAD
    wide = round(language.ffn_hidden_size / language.hidden_size * heads) * HEAD
    return replace(
        language,
        num_layers=LAYERS,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=groups,
        head_dim=language.head_dim and 2 * HEAD,
        ffn_hidden_size=wide,
        vocab_size=VOCABULARY,
        weights=None,
    )


def _vision(vision: VisionConfig) -> VisionConfig:
    """Keeps the smallest prime factor of the number of heads: 5 of 25, 2 of 16."""
    heads = min(n for n in range(2, vision.num_heads + 1) if vision.num_heads % n == 0)
    return replace(
        vision,
        num_layers=2,
        hidden_size=heads * HEAD,
        num_heads=heads,
        ffn_hidden_size=2 * heads * HEAD,
        tile_size=32,
        patch_size=8,
        batch_tiles=8,
        weights=None,
    )


def _stage(stage: StageConfig, data: Path) -> StageConfig:
    return replace(
        stage,
        blend=str(data / "blend.yaml"),
        steps=2,
        # The smoke data's samples have up to some 100 tokens, tiles of four tokens included.
        sequence_length=max(128, stage.sequence_length // 16),
        pack_length=stage.pack_length and max(192, stage.pack_length // 16),
        batch=replace(stage.batch, size=6),
        optimizer=replace(stage.optimizer, warmup_steps=1),
        parallel=_layout(stage.parallel),
    )


def _layout(layout: ParallelConfig) -> ParallelConfig:
    """Keeps a pipeline as one of two stages, and as much tensor parallelism as four ranks allow."""
    pipeline = min(layout.pipeline, 2)
    return replace(layout, pipeline=pipeline, tensor=min(layout.tensor, RANKS // pipeline))
