"""Runs on a worker: bytes that a cross-attention layer takes at 34B shapes, by torch's allocator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile

from nvlm_train.config.model_schema import LanguageConfig
from nvlm_train.config.schema import ParallelConfig
from nvlm_train.device_batch import Span
from nvlm_train.model.build import transformer_config
from nvlm_train.model.cross_attention import CrossSubmodules, GatedCrossAttention
from nvlm_train.model.layers import implementations
from nvlm_train.model.pack import Sight
from nvlm_train.parallel import kernels
from nvlm_train.parallel.topology import build_topology
from tests.parity import cross_recipes, recipes

# Nous-Hermes-2-Yi-34B, the language model of the paper's 34B models, in its cross-attention.
HIDDEN, HEADS, GROUPS, CHANNELS = 7168, 56, 8, 128
TILE_TOKENS = 256
TEXT_TOKENS = 512


def bytes_by_tiles(counts: tuple[int, ...]) -> dict[int, tuple[int, int]]:
    """By tiles of an image: most bytes during forward, bytes kept for backward; fp32.

    The context itself is not counted: all layers share it.
    """
    language = LanguageConfig(
        num_layers=60, hidden_size=HIDDEN, num_heads=HEADS, num_kv_heads=GROUPS,
        ffn_hidden_size=20_480, vocab_size=64_000, rope_theta=5e6,
    )  # fmt: skip
    model = replace(cross_recipes.MODELS["x"], language=language)
    recipe = recipes.recipe(ParallelConfig(), model=model)
    stage = recipe.stages["sft"]
    build_topology(stage.parallel, recipe.seed)
    chosen = kernels.detect()
    _, column, row = implementations(chosen)
    layer = GatedCrossAttention(
        transformer_config(recipe, stage, chosen), CrossSubmodules(column, row), layer_number=1
    )
    hidden_SBH = torch.randn(TEXT_TOKENS, 1, HIDDEN, requires_grad=True)
    found = {}
    for tiles in counts:
        context_CBH = torch.randn(tiles * TILE_TOKENS, 1, HIDDEN, requires_grad=True)
        # Three tokens of each tile's tag, then text that sees all tiles.
        tags = [
            (4 + 3 * tile, 7 + 3 * tile, TILE_TOKENS * tile, TILE_TOKENS * (tile + 1))
            for tile in range(tiles)
        ]
        spans = tuple(
            Span(*span) for span in [*tags, (4 + 3 * tiles, TEXT_TOKENS, 0, len(context_CBH))]
        )
        found[tiles] = most_and_kept(partial(layer, hidden_SBH, Sight(spans), context_CBH))
    return found


def most_and_kept(run: Callable[[], object]) -> tuple[int, int]:
    """Bytes above those before `run`: the most at any time, and what its result keeps alive."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    events = profiler.profiler.kineto_results.events()
    changes = sorted(
        (event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"
    )
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    del result
    return most, now


def keys_and_values(tiles: int) -> int:
    """Bytes of one layer's keys and values for so many tiles."""
    return tiles * TILE_TOKENS * 2 * GROUPS * CHANNELS * torch.float32.itemsize


def context(tiles: int) -> int:
    """Bytes of the projected context of so many tiles."""
    return tiles * TILE_TOKENS * HIDDEN * torch.float32.itemsize
