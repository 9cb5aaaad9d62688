"""Pure functions of the step: the learning rate, and the run's place in the schedule of stages."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from nvlm_train.config.schema import OptimizerConfig, Recipe


def learning_rate(settings: OptimizerConfig, step: int, num_steps: int) -> float:
    """Returns the learning rate of a step: a linear warm-up, then a cosine from `lr` to `min_lr`.

    The schedule is that of the paper (NVLM 1.0, Tables 10 and 11).

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
    """Counts the steps done in a stage. This integer is the whole state of the data."""

    stage: str
    step: int


def global_step(recipe: Recipe, position: Position) -> int:
    """Returns the steps done since the start of the schedule."""
    earlier = recipe.schedule[: recipe.schedule.index(position.stage)]
    return sum(recipe.stages[name].steps for name in earlier) + position.step


def stages_to_run(recipe: Recipe, done: Position | None) -> Iterator[Position]:
    """Yields where each unfinished stage starts: the interrupted one at its step, later ones at 0.

    Args:
        recipe: its schedule and the steps of its stages matter.
        done: where the newest checkpoint stands; None when there is none.
    """
    reached = done is None
    for name in recipe.schedule:
        if done is not None and name == done.stage:
            reached = True
            if done.step < recipe.stages[name].steps:
                yield done
        elif reached:
            yield Position(name, 0)
