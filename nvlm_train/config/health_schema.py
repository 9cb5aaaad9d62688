"""The recipe's `health` group. The defaults suit a run on many GPUs overnight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class HealthConfig:
    """What is done when a run falls ill while nobody looks. `docs/health.md` explains each part."""

    max_non_finite_steps: int = 3
    """Steps in a row whose loss or gradient norm is not finite that are left out; one more stops the
    run, and 0 stops it at the first."""
    spike: Literal["off", "warn", "rollback"] = "warn"
    """`rollback` goes back to the newest checkpoint and leaves out the steps around the spike."""
    spike_window: int = 128
    """Steps whose losses say what is usual; a quarter of them must be there before anything is a spike."""
    spike_threshold: float = 10.0
    """A spike lies so many scaled MADs (robust standard deviations) above the window's median."""
    spike_skip_steps: int = 10
    """Steps left out on either side of the spike after a rollback."""
    max_rollbacks: int = 3
    """In a run; one more spike stops it."""
    hang_factor: float = 10.0
    """A step that takes so many times the median step is a hang,"""
    hang_floor_seconds: float = 300.0
    """but not before so many seconds,"""
    hang_grace_seconds: float = 1800.0
    """and so many where long waits are usual: a stage's first steps, saving, evaluation."""
    straggler_interval_steps: int = 50
    """Steps over which the ranks' own times are summed before they are compared."""
    straggler_threshold: float = 1.2
    """A rank is slow when its own time is so many times the median of all ranks',"""
    straggler_patience: int = 3
    """and a straggler when it is the slowest and slow so many comparisons in a row."""
    heartbeat_seconds: float = 10.0
    """Between two writes of RUN_DIR/heartbeat.json."""
