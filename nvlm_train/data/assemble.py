"""From a recipe's stage to its plan and encoder: the one call the trainer makes."""

from __future__ import annotations

import logging

from nvlm_train.config.schema import Recipe, StageConfig
from nvlm_train.data.data_recipe import Blend, SourceConfig, read_blend
from nvlm_train.data.encoding import EncodingSpec, SampleEncoder
from nvlm_train.data.index import load_index
from nvlm_train.data.lengths import load_lengths
from nvlm_train.data.plan import DataPlan
from nvlm_train.data.reader import ShardReader
from nvlm_train.data.shards import join_root
from nvlm_train.data.sources import Source
from nvlm_train.data.store import DIRECT, Store, build_store
from nvlm_train.errors import ShardError
from nvlm_train.geometry import context_tokens_per_tile, tokens_per_tile
from nvlm_train.routes import ROUTES
from nvlm_train.tokens import Tokenizer

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
        TrainingError: more unusable samples than the recipe tolerates.
    """
    blend = read_blend(stage.blend, recipes_dir)
    encoder = build_encoder(stage, recipe)
    sources = open_sources(blend, recipe.loader.data_root, encoder, build_store(recipe.loader))
    plan = DataPlan(
        sources, stage.batch, stage.sequence_length, recipe.seed, recipe.loader.max_skipped_fraction
    )
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
    spec = EncodingSpec(
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
    return SampleEncoder(Tokenizer(recipe.model.tokenizer), spec)


def open_sources(
    blend: Blend, data_root: str, encoder: SampleEncoder, store: Store = DIRECT
) -> list[Source]:
    """Every source with its shards' indexes and lengths. Raises ShardError."""
    return [_open_source(blend.name, source, data_root, encoder, store) for source in blend.sources]


def _open_source(
    blend: str, source: SourceConfig, data_root: str, encoder: SampleEncoder, store: Store
) -> Source:
    readers: list[ShardReader] = []
    for name in source.shards:
        path = join_root(data_root, name)
        shard = store.open(path)
        try:
            index = load_index(shard)
        except FileNotFoundError as error:
            raise ShardError(
                f"missing shard={path}: blend={blend} source={source.name} names {name}, and "
                f"relative names start at loader.data_root={data_root}; correct either, or write "
                "the shard with `nvlm data prepare`"
            ) from error
        except OSError as error:
            raise ShardError(
                f"shard={path} cannot be read: {error}; blend={blend} source={source.name} names it"
            ) from error
        readers.append(ShardReader(name, shard, index))
    lengths = tuple(load_lengths(reader, encoder) for reader in readers)
    return Source(source.name, source.weight, tuple(readers), lengths)
