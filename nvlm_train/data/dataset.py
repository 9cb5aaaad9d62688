"""From a recipe's stage to its plan and encoder: the one call the trainer makes."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from nvlm_train.config.schema import Recipe, StageConfig
from nvlm_train.data.index.files import IndexFiles
from nvlm_train.data.plan.data_recipe import Blend, read_blend
from nvlm_train.data.plan.open_sources import open_sources
from nvlm_train.data.plan.plan import DataPlan
from nvlm_train.data.plan.shard_lists import list_shards
from nvlm_train.data.samples.encoder import EncodingSpec, SampleEncoder
from nvlm_train.data.shards.store import build_store
from nvlm_train.data.shards.tar import join_root
from nvlm_train.geometry import context_tokens_per_tile, tokens_per_tile
from nvlm_train.routes import ROUTES
from nvlm_train.tokens import Tokenizer

__all__ = ["build_data", "build_encoder", "encoding_spec", "open_sources", "table_stem"]

_log = logging.getLogger(__name__)


def build_data(
    stage: StageConfig, recipe: Recipe, recipes_dir: str
) -> tuple[DataPlan, SampleEncoder]:
    """Plan and encoder of a stage; shards without an up-to-date index are indexed first.

    Indexes are shared through the file system: let one rank call this first, the others after it,
    or all of them do the same work.

    Raises:
        ConfigError: the data recipe or the tokenizer.
        ShardError: a shard that is missing or torn.
        TrainingError: more unusable samples than the recipe tolerates, or fewer samples than its
            steps take.
    """
    blend = list_shards(read_blend(stage.blend, recipes_dir), recipe.loader.data_root)
    encoder = build_encoder(stage, recipe)
    loader = recipe.loader
    store = build_store(loader)
    sources = open_sources(blend, loader.data_root, encoder, loader.index_dir, store)
    plan = DataPlan(
        sources,
        stage.batch,
        stage.sequence_length,
        recipe.seed,
        loader.max_skipped_fraction,
        table_stem(blend, recipe),
    )
    plan.check_steps(stage.steps)
    for kind in plan.unusable:
        _log.warning("%d samples are left out: %s", kind.count, "; ".join(kind.examples))
    for source in sources:
        if source.num_truncated:
            _log.warning(
                "source=%s: %d of %d samples are cut at sequence_length=%d",
                source.name, source.num_truncated, source.num_samples, stage.sequence_length,
            )  # fmt: skip
    return plan, encoder


def build_encoder(stage: StageConfig, recipe: Recipe) -> SampleEncoder:
    """How the stage turns records into tokens; generation and evaluation use the same."""
    return SampleEncoder(Tokenizer(recipe.model.tokenizer), encoding_spec(stage, recipe))


def encoding_spec(stage: StageConfig, recipe: Recipe) -> EncodingSpec:
    """What of a recipe decides how the stage's samples are encoded, besides the tokenizer."""
    return EncodingSpec(
        tile_size=recipe.model.vision.tile_size,
        tokens_per_tile=tokens_per_tile(recipe.model.vision),
        context_tokens_per_tile=context_tokens_per_tile(recipe.model),
        routes=ROUTES[recipe.model.architecture],
        tiling=stage.tiling,
        sequence_length=stage.sequence_length,
        prompts=stage.prompts,
        system_message=stage.system_message,
        max_image_pixels=recipe.loader.max_image_pixels,
    )


def table_stem(blend: Blend, recipe: Recipe) -> Path:
    """Where a blend's tables of packs lie: with the index of its first shard, else with the run."""
    loader = recipe.loader
    first = build_store(loader).open(join_root(loader.data_root, blend.sources[0].shards[0]))
    beside = IndexFiles(loader.index_dir).path(first, "")
    if beside is not None and os.access(beside.parent, os.W_OK):
        return beside
    return Path(recipe.run_dir) / blend.name
