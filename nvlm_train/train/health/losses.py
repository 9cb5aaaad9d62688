"""Judges the losses of a stage: not finite too often in a row, or far above the usual."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from nvlm_train.config.schema import HealthConfig

_MAD_TO_DEVIATION = 1.4826
"""Standard deviation of a normal distribution, in units of its median absolute deviation (MAD)."""
_LEAST_DEVIATION = 0.02
"""Least deviation as a share of the median: without it, a small rise among equal losses is a spike."""


@dataclass(frozen=True)
class NotFiniteStep:
    """A step that was left out writes this field: its loss or gradient norm was not finite somewhere."""

    not_finite: int = 1
    """The value is 1: weights and optimizer are as before the step, on all ranks. [none]"""


@dataclass(frozen=True)
class Spike:
    """Describes a loss that is far above the losses before it."""

    loss: float
    median: float
    deviation: float
    """Deviation of the losses in the window: their scaled MAD."""


class LossWatch:
    """Follows the losses of a stage. Its answers are equal on all ranks, which all see the same losses.

    Args:
        config: window and limits.
        history: (loss, whether the step was finite) of the stage's earlier steps, so that a resumed
            run judges as the uninterrupted one does.
    """

    def __init__(self, config: HealthConfig, history: Iterable[tuple[float, bool]] = ()) -> None:
        self._config = config
        self._window: deque[float] = deque(maxlen=config.spike_window)
        self.not_finite_in_a_row = 0
        for loss, is_finite in history:
            self.add(loss, is_finite)

    def add(self, loss: float, is_finite: bool) -> Spike | None:
        """Takes a step's loss. Returns a spike when the loss is one, else None."""
        if not is_finite:
            self.not_finite_in_a_row += 1
            return None
        self.not_finite_in_a_row = 0
        spike = self._judge(loss)
        self._window.append(loss)
        return spike

    def _judge(self, loss: float) -> Spike | None:
        if len(self._window) < max(self._config.spike_window // 4, 2) or not math.isfinite(loss):
            return None
        middle = median(self._window)
        mad = median(abs(each - middle) for each in self._window)
        deviation = max(_MAD_TO_DEVIATION * mad, _LEAST_DEVIATION * abs(middle))
        if loss <= middle + self._config.spike_threshold * deviation:
            return None
        return Spike(loss, middle, deviation)
