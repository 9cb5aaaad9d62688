"""Rules on layouts: what parallelism cuts, how many ranks that takes, and what is recomputed."""

from __future__ import annotations

import math
from collections.abc import Iterable

from nvlm_train.config.model_schema import ModelConfig
from nvlm_train.config.ranges import Problems, divisors, in_range, use
from nvlm_train.config.schema import ParallelConfig, Recipe, RecomputedPart, StageConfig


def vocabulary_is_cut_evenly(recipe: Recipe) -> Problems:
    """Tensor parallelism cuts the table; padding makes it fit, to one size for the layouts of all stages."""
    rows = recipe.model.language.vocab_size
    tokens = recipe.model.language.num_tokens or rows
    scheduled = [name for name in recipe.schedule if name in recipe.stages]
    sizes = {name: recipe.stages[name].parallel.tensor for name in scheduled}
    use_rows = padded_rows(rows, sizes.values())
    for name, size in sizes.items():
        if size > 0 and rows % size:
            yield (
                f"stages.{name}.parallel.tensor={size} does not divide model.language.vocab_size={rows}; "
                f"use {use_rows}, with model.language.num_tokens={tokens}"
            )


def layout_fits_model(path: str, stage: StageConfig, model: ModelConfig) -> Problems:
    """Tensor parallelism cuts heads, groups and feed-forward; the pipeline cuts layers."""
    layout, language, name = stage.parallel, model.language, f"{path}.parallel"
    for key in ("tensor", "pipeline", "max_tiles_in_flight"):
        yield from in_range(f"{name}.{key}", getattr(layout, key), 1)
    if layout.tensor < 1 or layout.pipeline < 1:
        return
    sizes = {
        "model.language.num_heads": language.num_heads,
        "model.language.num_kv_heads": language.num_kv_heads,
        "model.language.ffn_hidden_size": language.ffn_hidden_size,
    }
    if model.projector.ffn_hidden_size is not None:
        sizes["model.projector.ffn_hidden_size"] = model.projector.ffn_hidden_size
    if layout.sequence_parallel:
        name_of_length = "sequence_length" if stage.pack_length is None else "pack_length"
        sizes[f"{path}.{name_of_length}"] = getattr(stage, name_of_length)
    # Divisors of all sizes, so that following the remedy breaks no other rule.
    remedy = use(divisors(max(1, math.gcd(*sizes.values()))))
    for key, size in sizes.items():
        if size % layout.tensor:
            yield f"{name}.tensor={layout.tensor} does not divide {key}={size}; {remedy}"
    if language.num_layers % layout.pipeline:
        yield (
            f"{name}.pipeline={layout.pipeline} does not divide model.language.num_layers="
            f"{language.num_layers}; {use(divisors(max(1, language.num_layers)))}"
        )
    if layout.sequence_parallel and layout.tensor == 1:
        yield f"{name}.sequence_parallel=true needs {name}.tensor above 1; set it to false or raise tensor"


def layout_fits_world(path: str, stage: StageConfig, world_size: int) -> Problems:
    """Ranks are whole model replicas; what remains of the world is data parallelism."""
    layout = stage.parallel
    replica = layout.tensor * layout.pipeline
    if replica >= 1 and world_size % replica:
        yield (
            f"{path}.parallel: tensor={layout.tensor} x pipeline={layout.pipeline} = {replica} ranks do not "
            f"divide the world of {world_size}; start a multiple of {replica} processes or change the layout"
        )


def recomputed_parts(parallel: ParallelConfig) -> tuple[RecomputedPart, ...]:
    """The parts of a layer that are made again by themselves, and not with the whole layer."""
    return () if isinstance(parallel.recompute, str) else parallel.recompute


def padded_rows(rows: int, tensor_sizes: Iterable[int]) -> int:
    """The rows of a table that all these sizes cut: multiples of 64 suit matrix products, too.

    >>> padded_rows(641, [2, 3])
    768
    """
    unit = math.lcm(64, *(max(1, size) for size in tensor_sizes))
    return -(-rows // unit) * unit
