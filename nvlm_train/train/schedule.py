"""Pure functions of the step: the learning rate, and where in the schedule of stages a run stands."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from nvlm_train.config.schema import OptimizerConfig, Recipe


def learning_rate(settings: OptimizerConfig, step: int, num_steps: int) -> float:
    """Linear warm-up, then a cosine from `lr` to `min_lr` over the stage (NVLM 1.0, Tables 10 and 11).

    Args:
        settings: the stage's optimizer.
        step: 0 for the stage's first step.
        num_steps: steps of the stage.
    """
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(num_steps - settings.warmup_steps - 1, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return settings.min_lr + (settings.lr - settings.min_lr) * cosine


@dataclass(frozen=True)
class Position:
    """Steps done in a stage. One integer is all the state that the data has."""

    stage: str
    step: int


def global_step(recipe: Recipe, position: Position) -> int:
    """Steps done since the start of the schedule."""
    earlier = recipe.schedule[: recipe.schedule.index(position.stage)]
    return sum(recipe.stages[name].steps for name in earlier) + position.step


def stages_to_run(recipe: Recipe, done: Position | None) -> Iterator[Position]:
    """Where each unfinished stage starts: the interrupted one at its step, later ones at 0."""
    reached = done is None
    for name in recipe.schedule:
        if done is not None and name == done.stage:
            reached = True
            if done.step < recipe.stages[name].steps:
                yield done
        elif reached:
            yield Position(name, 0)
