"""Records what this process is doing. The train loop writes it; the threads that watch it read it."""

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
"""Steps after which a stage counts as training. The first ones compile kernels, connect and fill caches."""


@dataclass
class Activity:
    """Holds what the process is doing. Only the training thread writes it.

    A reader may see a step's values change one by one.
    """

    doing: Doing = "starting"
    stage: str = ""
    step: int = 0
    """Number of steps of the stage that are done."""
    loss: float | None = None
    since: float = field(default_factory=time.monotonic)
    """Time of the last sign of progress, in seconds of `time.monotonic`."""
    durations: deque[float] = field(default_factory=lambda: deque(maxlen=64))
    """Seconds that the stage's latest steps took, without its first step."""
    _steps_seen: int = 0

    def start_stage(self, stage: str, step: int) -> None:
        """Notes that a stage is being built, and forgets the durations of the last one."""
        self.stage, self.step, self.loss, self._steps_seen = stage, step, None, 0
        self.durations.clear()
        self._turn_to("starting")

    def stepped(self, step: int, loss: float) -> None:
        """Notes that a step is done, and its loss."""
        self.step, self.loss = step, loss
        self._steps_seen += 1
        if self._steps_seen > 1:
            self.durations.append(time.monotonic() - self.since)
        self._turn_to("training" if self._steps_seen >= _USUAL_AFTER else "starting")

    @contextmanager
    def busy(self, doing: Doing) -> Iterator[None]:
        """Marks the block as something that is no step and may take longer: `saving`, `evaluating`."""
        before = self.doing
        self._turn_to(doing)
        yield
        self._turn_to(before)

    def _turn_to(self, doing: Doing) -> None:
        self.doing = doing
        self.since = time.monotonic()

    def end(self, doing: Doing) -> None:
        """Notes that the process has `ended` or `failed`, so that no more progress is expected."""
        self._turn_to(doing)


def patience(config: HealthConfig, activity: Activity) -> float:
    """Returns the seconds without a sign of progress after which the process counts as hanging."""
    durations = list(activity.durations)
    if activity.doing != "training" or not durations:
        return config.hang_grace_seconds
    return max(config.hang_floor_seconds, config.hang_factor * median(durations))
