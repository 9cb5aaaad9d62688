"""Decides whether a recipe may go on from a checkpoint: which fields must be equal, which may change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from nvlm_train.config.model_schema import VisionConfig
from nvlm_train.config.schema import Recipe
from nvlm_train.errors import CheckpointError
from nvlm_train.geometry import encoder_batch
from nvlm_train.train.checkpoint.run_state import RunState, plain_recipe

Plain = Mapping[str, Any]
Rule = Callable[[RunState, Plain, Plain], Iterator[str]]
"""(state, recipe of the checkpoint, present recipe) -> each forbidden difference, with both values."""

_DATA_FIELDS = (
    "trainable", "blend", "sequence_length", "pack_length", "batch", "tiling", "system_message", "prompts",
)  # fmt: skip
"""Fields of a stage that decide the batch of its step n. None may change while the stage is unfinished."""


def check_resumable(
    state: RunState, recipe: Recipe, checkpoint: Path, rules: Sequence[Rule]
) -> None:
    """Compares the recipe with the one that made a checkpoint.

    Args:
        state: the checkpoint's.
        recipe: the present one.
        checkpoint: is named in the message.
        rules: TO_TRAIN or TO_READ.

    Raises:
        CheckpointError: names every field that differs, with both values.
    """
    now, then = plain_recipe(recipe), with_defaults(Recipe, state.recipe)
    if state.stage not in recipe.schedule:
        raise CheckpointError(
            f"{checkpoint} is in stage {state.stage}, which schedule={list(recipe.schedule)} does not "
            "have; name it there too (stages that are over are skipped), or use another run_dir"
        )
    wrong = [line for rule in rules for line in rule(state, then, now)]
    if wrong:
        raise CheckpointError(
            f"{checkpoint} was made by another recipe:\n"
            + "\n".join(f"  - {line}" for line in wrong)
            + "\nstart a new run with another run_dir, or put the values back"
        )


def _same_model(state: RunState, then: Plain, now: Plain) -> Iterator[str]:
    yield from _differences(_with_batch(then["model"]), _with_batch(now["model"]), "model")
    for field in ("seed", "precision"):
        yield from _differences(then[field], now[field], field)


def _with_batch(model: Plain) -> Plain:
    """States how many tiles the encoder takes at a time: what recipes leave open now, older ones state."""
    known = {field.name for field in fields(VisionConfig)}
    vision = VisionConfig(**{name: model["vision"][name] for name in known})
    return {**model, "vision": {**model["vision"], "batch_tiles": encoder_batch(vision)}}


def _same_tags(state: RunState, then: Plain, now: Plain) -> Iterator[str]:
    """Refuses stages of format 1 without thumbnails: their last tile was tagged as a thumbnail."""
    tiling = now["stages"][state.stage]["tiling"]
    if state.format == 1 and not tiling["thumbnail"] and tiling["tags"] != "none":
        yield (
            f"stages.{state.stage}.tiling.thumbnail=false: the stage was trained with its last tile "
            "tagged as a thumbnail, which this version does not do any more: use the nvlm-train that "
            "wrote the checkpoint"
        )


def _same_data(state: RunState, then: Plain, now: Plain) -> Iterator[str]:
    """Keeps the data of an unfinished stage."""
    before, after = then["stages"][state.stage], now["stages"][state.stage]
    if state.step < after["steps"]:
        for field in _DATA_FIELDS:
            yield from _differences(before[field], after[field], f"stages.{state.stage}.{field}")


def _same_rest(state: RunState, then: Plain, now: Plain) -> Iterator[str]:
    """Keeps the tags of an unfinished stage, and the kind of its optimizer.

    Only megatron-core's distributed optimizer can read what it has saved, in any layout.
    """
    before, after = then["stages"][state.stage], now["stages"][state.stage]
    if state.step < after["steps"]:
        yield from _same_tags(state, then, now)
        key = "distributed_optimizer"
        path = f"stages.{state.stage}.parallel.{key}"
        yield from _differences(before["parallel"][key], after["parallel"][key], path)


def _same_past(state: RunState, then: Plain, now: Plain) -> Iterator[str]:
    """Keeps finished stages and their steps, because the steps of the run are counted through them."""
    reached = then["schedule"].index(state.stage)
    over = then["schedule"][:reached]
    if now["schedule"][: reached + 1] != then["schedule"][: reached + 1]:
        yield f"schedule={now['schedule']}, and the run came through {over} to {state.stage}"
        return
    for name in over:
        asked, done = now["stages"][name]["steps"], then["stages"][name]["steps"]
        if asked != done:
            yield (
                f"stages.{name}.steps={asked}, and stage {name} ended after {done}; "
                f"more steps can be asked of {state.stage} and later stages"
            )
    asked = now["stages"][state.stage]["steps"]
    if asked < state.step:
        yield (
            f"stages.{state.stage}.steps={asked}, and {state.step} are done; "
            f"{state.step} ends the stage here"
        )


TO_READ: tuple[Rule, ...] = (_same_model, _same_data, _same_tags)
"""Rules for generation: the weights must be used as they were trained."""
TO_TRAIN: tuple[Rule, ...] = (_same_model, _same_data, _same_rest, _same_past)
"""Rules for training on."""


def with_defaults(hint: Any, stored: Any) -> Any:
    """Adds fields that a stored recipe lacks, because the schema got them later, at their defaults.

    A default is what the code did before the field existed, so older runs can go on.

    Args:
        hint: the schema's type of what is stored.
        stored: the stored recipe, or a part of it.
    """
    kind = get_origin(hint)
    if is_dataclass(hint) and isinstance(stored, Mapping):
        hints = get_type_hints(hint)
        known = {name: with_defaults(hints[name], stored[name]) for name in hints if name in stored}
        return {**stored, **_defaults(hint), **known}
    if kind is Mapping and isinstance(stored, Mapping):
        return {name: with_defaults(get_args(hint)[1], each) for name, each in stored.items()}
    inner = [arg for arg in get_args(hint) if is_dataclass(arg)]
    return with_defaults(inner[0], stored) if inner and isinstance(stored, Mapping) else stored


def _defaults(schema: Any) -> dict[str, Any]:
    found = {}
    for field in fields(schema):
        if field.default is not MISSING:
            found[field.name] = field.default
        elif field.default_factory is not MISSING:
            found[field.name] = plain_recipe(field.default_factory())
    return found


def _differences(then: Any, now: Any, path: str) -> Iterator[str]:
    """Yields `FIELD=NOW, was THEN` for each value that differs; `path` is the name of the outer field."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        for key in sorted({*then, *now}):
            yield from _differences(then.get(key), now.get(key), f"{path}.{key}")
    elif then != now:
        yield f"{path}={now}, was {then}"
