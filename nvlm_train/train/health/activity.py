"""What this process is doing: told by the train loop, read by the threads that watch it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

from nvlm_train.config.schema import HealthConfig

Doing = Literal["starting", "training", "saving", "evaluating", "ended", "failed"]

_USUAL_AFTER = 3
"""Steps of a stage whose times may be anything: kernels are compiled, connections made, caches filled."""


@dataclass
class Activity:
    """One writer, the training thread; readers may see a step's values change one by one."""

    doing: Doing = "starting"
    stage: str = ""
    step: int = 0
    """Steps of the stage that are done."""
    loss: float | None = None
    since: float = field(default_factory=time.monotonic)
    """Seconds of `time.monotonic` at the last sign of progress."""
    durations: deque[float] = field(default_factory=lambda: deque(maxlen=64))
    """Seconds of the stage's latest steps, without the first ones."""
    _steps_seen: int = 0

    def start_stage(self, stage: str, step: int) -> None:
        """A stage is being built; what its steps take is not known yet."""
        self.stage, self.step, self.loss, self._steps_seen = stage, step, None, 0
        self.durations.clear()
        self._turn_to("starting")

    def stepped(self, step: int, loss: float) -> None:
        """A step is done."""
        self.step, self.loss = step, loss
        self._steps_seen += 1
        if self._steps_seen > 1:
            self.durations.append(time.monotonic() - self.since)
        self._turn_to("training" if self._steps_seen >= _USUAL_AFTER else "starting")

    @contextmanager
    def busy(self, doing: Doing) -> Iterator[None]:
        """Around what takes longer than a step and is no step: `saving`, `evaluating`."""
        before = self.doing
        self._turn_to(doing)
        yield
        self._turn_to(before)

    def _turn_to(self, doing: Doing) -> None:
        self.doing = doing
        self.since = time.monotonic()

    def end(self, doing: Doing) -> None:
        """Nothing more is expected of this process: `ended` or `failed`."""
        self._turn_to(doing)


def patience(config: HealthConfig, activity: Activity) -> float:
    """Seconds without a sign of progress after which what is being done is a hang."""
    durations = list(activity.durations)
    if activity.doing != "training" or not durations:
        return config.hang_grace_seconds
    return max(config.hang_floor_seconds, config.hang_factor * median(durations))
