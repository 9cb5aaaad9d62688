"""From a recipe's stage to its plan and encoder: the one call the trainer makes."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from nvlm_train.config.schema import Recipe, StageConfig
from nvlm_train.data.index.files import IndexFiles
from nvlm_train.data.plan.attention_cost import attention_cost
from nvlm_train.data.plan.data_recipe import Blend, list_shards, read_blend
from nvlm_train.data.plan.packing import Packing
from nvlm_train.data.plan.plan import DataPlan
from nvlm_train.data.plan.sources import open_sources
from nvlm_train.data.samples.encoder import EncodingSpec, SampleEncoder
from nvlm_train.data.shards.store import Store, build_store
from nvlm_train.geometry import context_tokens_per_tile, pack_lengths, tokens_per_tile
from nvlm_train.routes import ROUTES
from nvlm_train.tokens import Tokenizer

_log = logging.getLogger(__name__)


def build_data(
    stage: StageConfig, recipe: Recipe, recipes_dir: str
) -> tuple[DataPlan, SampleEncoder]:
    """Returns a stage's plan and encoder; shards without an up-to-date index are indexed first.

    Indexes are shared through the file system: let one rank call this first, the others after it,
    or all of them do the same work.

    Raises:
        ConfigError: the data recipe or the tokenizer.
        ShardError: a shard that is missing or torn.
        TrainingError: more unusable samples than the recipe tolerates, or fewer samples than its
            steps take.
    """
    loader = recipe.loader
    store = build_store(loader)
    encoder = build_encoder(stage, recipe)
    blend = list_shards(read_blend(stage.blend, recipes_dir), store)
    stem = table_stem(blend, store, recipe)
    sources = open_sources(blend, store, encoder, loader.index_dir)
    plan = DataPlan(
        sources,
        stage.batch,
        stage.sequence_length,
        recipe.seed,
        loader.max_skipped_fraction,
        stem,
        Packing(pack_lengths(stage), attention_cost(recipe.model)),
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
    """Returns the encoder of the stage; generation and evaluation use the same."""
    spec = encoding_spec(stage, recipe)
    return SampleEncoder(Tokenizer(recipe.model.tokenizer), spec)


def encoding_spec(stage: StageConfig, recipe: Recipe) -> EncodingSpec:
    """Returns what decides, besides the tokenizer, how the stage's samples are encoded."""
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


def table_stem(blend: Blend, store: Store, recipe: Recipe) -> Path:
    """Returns where a blend's tables of packs lie, as the start of their names.

    They lie with the index of the blend's first shard where that can be written, else with the run.
    """
    first = store.open(blend.sources[0].shards[0])
    beside = IndexFiles(recipe.loader.index_dir).path(first, "")
    if beside is not None and os.access(beside.parent, os.W_OK):
        return beside
    return Path(recipe.run_dir) / blend.name
