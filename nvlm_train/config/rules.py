"""Rules that span several fields of a recipe: small functions that yield problems; all of them run."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from nvlm_train.config.cross_rules import (
    architecture_has_its_parts,
    gates_open_at_some_time,
    thumbnail_is_there,
)
from nvlm_train.config.health_rules import health_is_usable
from nvlm_train.config.model_schema import ModelConfig
from nvlm_train.config.ranges import Problems, below_one, divisors, in_range, use
from nvlm_train.config.run_rules import counters_are_positive, run_dir_is_a_directory
from nvlm_train.config.schema import Recipe, StageConfig
from nvlm_train.errors import ConfigError

_STAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def check(recipe: Recipe, world_size: int | None = None) -> None:
    """Runs every rule on the scheduled stages and on what they share.

    Args:
        recipe: a built recipe.
        world_size: number of ranks, known at launch only.

    Raises:
        ConfigError: each rule that is broken, as `name=value`, the rule, the remedy.
    """
    problems = [problem for rule in _RECIPE_RULES for problem in rule(recipe)]
    for name in dict.fromkeys(recipe.schedule):
        stage = recipe.stages.get(name)
        if stage is None:
            continue
        for rule in _STAGE_RULES:
            problems += rule(f"stages.{name}", stage, recipe.model)
        if world_size is not None:
            problems += layout_fits_world(f"stages.{name}", stage, world_size)
    if problems:
        raise ConfigError(problems)


# ---- the recipe ----


def schedule_names_stages(recipe: Recipe) -> Problems:
    """Every scheduled stage exists, once, under a name that can be a directory."""
    shown, known = ",".join(recipe.schedule), ", ".join(recipe.stages)
    if not recipe.schedule:
        yield f"schedule=[] runs nothing; name at least one of the stages {known}"
    for name in dict.fromkeys(recipe.schedule):
        if name not in recipe.stages:
            yield f"schedule=[{shown}] names the stage {name}, which does not exist; use {known}"
        if not _STAGE_NAME.fullmatch(name):
            yield f"schedule=[{shown}]: {name} cannot name a directory; use letters, digits, _ and -"
        if recipe.schedule.count(name) > 1:
            yield f"schedule=[{shown}] runs {name} more than once; give the second run its own stage"


def vision_shapes_fit(recipe: Recipe) -> Problems:
    """Patches cut a tile evenly, pixel shuffle finds pairs of them, heads cut the width evenly."""
    vision = recipe.model.vision
    name = "model.vision"
    for key in (
        "num_layers",
        "hidden_size",
        "num_heads",
        "ffn_hidden_size",
        "patch_size",
        "batch_tiles",
    ):
        yield from in_range(f"{name}.{key}", getattr(vision, key), 1)
    if vision.patch_size < 1 or vision.num_heads < 1:
        return
    if vision.tile_size < 1 or vision.tile_size % vision.patch_size:
        yield (
            f"{name}.patch_size={vision.patch_size} does not divide {name}.tile_size={vision.tile_size}; "
            f"use a tile_size that is a multiple of {2 * vision.patch_size}"
        )
    elif vision.tile_size // vision.patch_size % 2:
        side = vision.tile_size // vision.patch_size
        yield (
            f"{name}.tile_size={vision.tile_size} makes {side} patches a side; pixel shuffle "
            f"joins 2 x 2: use a multiple of {2 * vision.patch_size}"
        )
    if vision.hidden_size % vision.num_heads:
        yield _heads(name, vision.num_heads, vision.hidden_size)


def _heads(name: str, heads: int, hidden: int) -> str:
    fitting = [value for value in divisors(hidden) if value <= heads]
    return (
        f"{name}.num_heads={heads} does not divide {name}.hidden_size={hidden}; {use(fitting[-4:])}"
    )


def language_shapes_fit(recipe: Recipe) -> Problems:
    """Heads cut the width evenly, KV groups cut the heads evenly, RoPE finds pairs of channels."""
    language = recipe.model.language
    name = "model.language"
    keys = (
        "num_layers",
        "hidden_size",
        "num_heads",
        "num_kv_heads",
        "ffn_hidden_size",
        "vocab_size",
    )
    for key in keys:
        yield from in_range(f"{name}.{key}", getattr(language, key), 1)
    between = recipe.model.projector.ffn_hidden_size
    if between is not None:
        yield from in_range("model.projector.ffn_hidden_size", between, 1)
    heads, groups, hidden = language.num_heads, language.num_kv_heads, language.hidden_size
    if min(heads, groups, hidden) < 1:
        return
    if hidden % heads:
        yield _heads(name, heads, hidden)
    elif hidden // heads % 2:
        yield f"{name}.num_heads={heads} makes heads of {hidden // heads} channels; RoPE needs an even number"
    if heads % groups:
        remedy = use(divisors(heads))
        yield f"{name}.num_kv_heads={groups} does not divide {name}.num_heads={heads}; {remedy}"


# ---- one stage ----


def something_trains(path: str, stage: StageConfig, model: ModelConfig) -> Problems:
    """A stage that trains nothing is a mistake; a part named twice is another."""
    if not stage.trainable:
        yield f"{path}.trainable=[] trains nothing; name projector, cross_attention or language_model"
    if len(set(stage.trainable)) < len(stage.trainable):
        yield f"{path}.trainable=[{','.join(stage.trainable)}] names a part twice; name each once"


def steps_and_rates_fit(path: str, stage: StageConfig, model: ModelConfig) -> Problems:
    """Warm-up ends before the stage does, and the rate decays downward."""
    optimizer, name = stage.optimizer, f"{path}.optimizer"
    yield from in_range(f"{path}.steps", stage.steps, 1)
    yield from in_range(f"{name}.warmup_steps", optimizer.warmup_steps, 0)
    yield from in_range(f"{name}.min_lr", optimizer.min_lr, 0)
    yield from in_range(f"{name}.weight_decay", optimizer.weight_decay, 0)
    yield from below_one(f"{name}.beta1", optimizer.beta1)
    yield from below_one(f"{name}.beta2", optimizer.beta2)
    if optimizer.warmup_steps >= stage.steps:
        yield (
            f"{name}.warmup_steps={optimizer.warmup_steps} does not end before {path}.steps={stage.steps}; "
            "warm up for fewer steps"
        )
    if optimizer.lr < optimizer.min_lr:
        yield f"{name}.min_lr={optimizer.min_lr} is above {name}.lr={optimizer.lr}; use at most lr"
    for key in ("lr", "eps", "clip_grad"):
        if getattr(optimizer, key) <= 0:
            yield f"{name}.{key}={getattr(optimizer, key)} is out of range; use more than 0"


def batch_is_possible(path: str, stage: StageConfig, model: ModelConfig) -> Problems:
    """Sizes of the batch and the tiling; an image of one tile must fit a pack."""
    yield from in_range(f"{path}.batch.size", stage.batch.size, 1)
    yield from in_range(f"{path}.batch.window", stage.batch.window, 1)
    if stage.batch.max_tiles_per_pack is not None:
        yield from in_range(f"{path}.batch.max_tiles_per_pack", stage.batch.max_tiles_per_pack, 1)
    yield from in_range(f"{path}.tiling.max_tiles", stage.tiling.max_tiles, 1)
    yield from below_one(f"{path}.hidden_dropout", stage.hidden_dropout)
    yield from below_one(f"{path}.attention_dropout", stage.attention_dropout)
    vision = model.vision
    tokens = (vision.tile_size // (2 * vision.patch_size)) ** 2 if vision.patch_size > 0 else 0
    if model.architecture != "x" and stage.sequence_length <= tokens:
        yield (
            f"{path}.sequence_length={stage.sequence_length} has no room for one tile of {tokens} tokens "
            f"and its text; use more than {tokens}"
        )


def layout_fits_model(path: str, stage: StageConfig, model: ModelConfig) -> Problems:
    """Tensor parallelism cuts heads, groups, feed-forward and vocabulary; the pipeline cuts layers."""
    layout, language, name = stage.parallel, model.language, f"{path}.parallel"
    for key in ("tensor", "pipeline", "max_tiles_in_flight"):
        yield from in_range(f"{name}.{key}", getattr(layout, key), 1)
    if layout.tensor < 1 or layout.pipeline < 1:
        return
    sizes = {
        "model.language.num_heads": language.num_heads,
        "model.language.num_kv_heads": language.num_kv_heads,
        "model.language.ffn_hidden_size": language.ffn_hidden_size,
        "model.language.vocab_size": language.vocab_size,
    }
    if model.projector.ffn_hidden_size is not None:
        sizes["model.projector.ffn_hidden_size"] = model.projector.ffn_hidden_size
    if layout.sequence_parallel:
        sizes[f"{path}.sequence_length"] = stage.sequence_length
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


_RECIPE_RULES: tuple[Callable[[Recipe], Problems], ...] = (
    schedule_names_stages,
    vision_shapes_fit,
    language_shapes_fit,
    counters_are_positive,
    health_is_usable,
    run_dir_is_a_directory,
    architecture_has_its_parts,
    gates_open_at_some_time,
)

_STAGE_RULES: tuple[Callable[[str, StageConfig, ModelConfig], Problems], ...] = (
    something_trains,
    steps_and_rates_fit,
    batch_is_possible,
    layout_fits_model,
    thumbnail_is_there,
)
