"""Rules about what an architecture needs: a table of routes is only as good as the parts behind it."""

from __future__ import annotations

from nvlm_train.config.model_schema import ModelConfig
from nvlm_train.config.ranges import Problems, in_range
from nvlm_train.config.schema import Recipe, StageConfig


def architecture_has_its_parts(recipe: Recipe) -> Problems:
    """X and H read tiles through cross-attention; D has none."""
    model = recipe.model
    name, cross = f"model.architecture={model.architecture}", model.cross_attention
    if model.architecture == "d" and cross is not None:
        yield f"{name} sends every tile to the decoder; remove model.cross_attention, or use x or h"
    if model.architecture != "d" and cross is None:
        yield f"{name} needs model.cross_attention; state model.cross_attention.every, or use d"
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


def thumbnail_is_there(path: str, stage: StageConfig, model: ModelConfig) -> Problems:
    """H's decoder sees an image through its thumbnail only."""
    if model.architecture == "h" and not stage.tiling.thumbnail:
        yield (
            f"{path}.tiling.thumbnail=false leaves nothing of a tiled image in the decoder of "
            "model.architecture=h; set it to true, or use x"
        )
