"""How many samples a run may leave out."""

from __future__ import annotations

import math

from nvlm_train.errors import TrainingError


class SkipBudget:
    """Counts samples that were drawn and those that could not be decoded, since the process started."""

    def __init__(self, max_fraction: float) -> None:
        self._max_fraction = max_fraction
        self._drawn = self._skipped = 0

    def add(self, skipped: int, drawn: int) -> None:
        """Adds a step's counts. Both are the same on every rank, so all ranks stop together.

        The allowance is rounded up: any tolerance above zero forgives one sample.

        Raises:
            TrainingError: more were skipped than the recipe tolerates.
        """
        self._skipped += skipped
        self._drawn += drawn
        allowed = math.ceil(self._max_fraction * self._drawn)
        if self._skipped > allowed:
            raise TrainingError(
                f"{self._skipped} of {self._drawn} samples could not be decoded, "
                f"loader.max_skipped_fraction={self._max_fraction} allows {allowed}; the warnings above name "
                "them: repair the shards, or raise the limit"
            )
