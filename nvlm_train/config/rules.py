"""The rules that span several fields of a recipe: small functions that yield problems; all of them run."""

from __future__ import annotations

import re
from collections.abc import Callable

from nvlm_train.config.layouts import layout_fits_model, layout_fits_world, vocabulary_is_cut_evenly
from nvlm_train.config.model_schema import ModelConfig
from nvlm_train.config.ranges import Problems, above_zero, below_one, in_range
from nvlm_train.config.schema import Recipe, StageConfig
from nvlm_train.config.shapes import (
    language_shapes_fit,
    vision_shapes_fit,
)
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
    problems = [
        *vision_shapes_fit(recipe.model.vision),
        *language_shapes_fit(recipe.model.language),
    ]
    problems += [problem for rule in _RECIPE_RULES for problem in rule(recipe)]
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


def counters_are_positive(recipe: Recipe) -> Problems:
    """Reading, saving and tracking: nothing negative, nothing that would never happen."""
    loader, checkpoint = recipe.loader, recipe.checkpoint
    yield from in_range("seed", recipe.seed, 0)
    yield from in_range("loader.workers", loader.workers, 0)
    yield from in_range("loader.prefetch_steps", loader.prefetch_steps, 1)
    yield from in_range("loader.read_attempts", loader.read_attempts, 1)
    yield from in_range("loader.max_skipped_fraction", loader.max_skipped_fraction, 0, 1)
    yield from in_range("loader.max_image_pixels", loader.max_image_pixels, 1)
    yield from above_zero("loader", loader, "prefetch_gib", "cache_gib")
    yield from in_range("checkpoint.interval_steps", checkpoint.interval_steps, 1)
    yield from in_range("checkpoint.keep_last", checkpoint.keep_last, 1)
    yield from in_range("checkpoint.max_failed_saves", checkpoint.max_failed_saves, 0)
    tracking = recipe.tracking
    yield from in_range("tracking.log_every", tracking.log_every, 1)
    yield from in_range("tracking.num_examples", tracking.num_examples, 0)
    yield from in_range("tracking.example_tokens", tracking.example_tokens, 1)
    if tracking.examples_every is not None:
        yield from in_range("tracking.examples_every", tracking.examples_every, 1)


def health_is_usable(recipe: Recipe) -> Problems:
    """No count below zero, no limit that healthy steps would break, none that could never be reached."""
    health = recipe.health
    least = {
        "max_non_finite_steps": 0,
        "spike_window": 8,
        "spike_threshold": 1.0,
        "spike_skip_steps": 0,
        "max_rollbacks": 0,
        "hang_factor": 2.0,
        "hang_floor_seconds": 1.0,
        "straggler_interval_steps": 1,
        "straggler_threshold": 1.01,
        "straggler_patience": 1,
        "heartbeat_seconds": 0.1,
    }
    for name, low in least.items():
        yield from in_range(f"health.{name}", getattr(health, name), low)
    if health.hang_grace_seconds < health.hang_floor_seconds:
        yield (
            f"health.hang_grace_seconds={health.hang_grace_seconds} is below "
            f"health.hang_floor_seconds={health.hang_floor_seconds}; first steps and saves take longer "
            "than steps do: use at least as much"
        )


def run_dir_is_a_directory(recipe: Recipe) -> Problems:
    """A checkpoint becomes visible by one atomic rename, which object stores do not have."""
    if "://" in recipe.run_dir:
        yield (
            f"run_dir={recipe.run_dir} is a URL; checkpoints need a file system that renames directories: "
            "use a local or shared directory, and copy checkpoints/STAGE-STEP from there when its "
            "manifest.json exists"
        )


def architecture_has_its_parts(recipe: Recipe) -> Problems:
    """X and H read tiles through cross-attention; D has none."""
    model = recipe.model
    name, cross = f"model.architecture={model.architecture}", model.cross_attention
    if model.architecture == "d" and cross is not None:
        yield f"{name} sends every tile to the decoder; remove model.cross_attention, or use x or h"
    if model.architecture != "d" and cross is None:
        yield f"{name} needs model.cross_attention; state model.cross_attention.every, or use d"
    yield from above_zero("model.projector", model.projector, "norm_eps")
    if model.projector.ffn_hidden_size is not None:
        yield from in_range("model.projector.ffn_hidden_size", model.projector.ffn_hidden_size, 1)
    if model.resampler is not None:
        yield from in_range("model.resampler.num_latents", model.resampler.num_latents, 1)
        yield from in_range("model.resampler.num_layers", model.resampler.num_layers, 1)
        if model.architecture != "x":
            yield (
                f"{name} splices tokens into the decoder, which model.resampler would replace; "
                "use x, or remove model.resampler"
            )
    if cross is None:
        return
    yield from in_range("model.cross_attention.every", cross.every, 1)
    if cross.every > model.language.num_layers:
        yield (
            f"model.cross_attention.every={cross.every} is more than model.language.num_layers="
            f"{model.language.num_layers}: no layer would have cross-attention; use at most that"
        )


def gates_open_at_some_time(recipe: Recipe) -> Problems:
    """Gates start at zero: cross-attention that never trains would keep the tiles out for good."""
    stages = [recipe.stages[name] for name in recipe.schedule if name in recipe.stages]
    if recipe.model.cross_attention is None or not stages:
        return
    if not any("cross_attention" in stage.trainable for stage in stages):
        yield (
            f"model.architecture={recipe.model.architecture}: no stage of the schedule trains "
            "cross_attention, whose gates start at 0, so that cross-routed tiles would never be seen; "
            "add cross_attention to a stage's trainable"
        )


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
    yield from above_zero(name, optimizer, "lr", "eps", "clip_grad")


def batch_is_possible(path: str, stage: StageConfig, model: ModelConfig) -> Problems:
    """Sizes of the batch and the tiling; an image of one tile must fit a sample, and any sample a pack."""
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
    if stage.pack_length is not None and stage.pack_length < stage.sequence_length:
        yield (
            f"{path}.pack_length={stage.pack_length} is below {path}.sequence_length="
            f"{stage.sequence_length}: a sample of that length would fit no pack; use at least "
            f"{stage.sequence_length}, or null"
        )


def thumbnail_is_there(path: str, stage: StageConfig, model: ModelConfig) -> Problems:
    """H's decoder sees an image through its thumbnail only."""
    if model.architecture == "h" and not stage.tiling.thumbnail:
        yield (
            f"{path}.tiling.thumbnail=false leaves nothing of a tiled image in the decoder of "
            "model.architecture=h; set it to true, or use x"
        )


_RECIPE_RULES: tuple[Callable[[Recipe], Problems], ...] = (
    schedule_names_stages,
    vocabulary_is_cut_evenly,
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
