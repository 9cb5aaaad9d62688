"""Rules of the recipe's `health` group."""

from __future__ import annotations

from nvlm_train.config.ranges import Problems, in_range
from nvlm_train.config.schema import Recipe


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
