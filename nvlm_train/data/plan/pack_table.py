"""How many packs come before each window of draws: what finds a step when packs are the unit.

Windows differ in their packs, so the sum over all earlier ones is needed. It is kept in a file that
grows with the run and that `nvlm data index` can fill ahead; without the file it is made again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nvlm_train.data.index.files import open_arrays, write_arrays

_log = logging.getLogger(__name__)

TABLE_VERSION = 1
_SAVE_EVERY = 128
"""Windows after which a grown table is written: what a resumed run counts again at most."""
_SLOW = 2000
"""Windows to count at once that deserve a line in the log."""


class PackTable:
    """Counts the packs of each window from the stage's first on, as far as they are asked for.

    Args:
        count_packs: packs of window n.
        path: the table's file; None to keep it in memory.
        fingerprint: the plan's; a table of another plan is not used.
    """

    def __init__(
        self, count_packs: Callable[[int], int], path: Path | None, fingerprint: str
    ) -> None:
        self._count_packs = count_packs
        self._path = path
        self._fingerprint = fingerprint
        self._ends = np.cumsum(self._stored(), dtype=np.int64)
        self._num_stored = len(self._ends)

    @property
    def num_windows(self) -> int:
        """Windows counted so far."""
        return len(self._ends)

    def before(self, window: int) -> int:
        """Returns the packs of all windows before this one, which has been counted."""
        return int(self._ends[window - 1]) if window else 0

    def find(self, pack: int, max_windows: int | None) -> int | None:
        """Returns the window that holds the pack; None when all `max_windows` windows hold fewer."""
        if pack >= self.before(len(self._ends)):
            self._grow(pack, max_windows)
        window = int(np.searchsorted(self._ends, pack, side="right"))
        return window if window < len(self._ends) else None

    def extend(self, counts: Iterable[int]) -> None:
        """Adds the packs of the next windows, counted elsewhere, and writes the file."""
        added = np.cumsum([self.before(len(self._ends)), *counts], dtype=np.int64)[1:]
        self._ends = np.concatenate([self._ends, added])
        self._save()

    def _grow(self, pack: int, max_windows: int | None) -> None:
        stored = self._stored()  # another rank may have come further
        if len(stored) > len(self._ends):
            self._ends = np.cumsum(stored, dtype=np.int64)
        counts: list[int] = []
        end = self.before(len(self._ends))
        while end <= pack and (max_windows is None or self.num_windows + len(counts) < max_windows):
            counts.append(self._count_packs(self.num_windows + len(counts)))
            end += counts[-1]
            if len(counts) == _SLOW:
                _log.warning(
                    "counting the packs of all windows before pack %d, which takes a while once; "
                    "`nvlm data index` does it ahead, in parallel",
                    pack,
                )
        added = np.cumsum(counts, dtype=np.int64) + self.before(len(self._ends))
        self._ends = np.concatenate([self._ends, added])
        if len(self._ends) - self._num_stored >= _SAVE_EVERY:
            self._save()

    def _save(self) -> None:
        """Writes the file unless another rank wrote a longer one."""
        if self._path is None:
            return
        if len(self._stored()) < len(self._ends):
            facts = {"version": TABLE_VERSION, "fingerprint": self._fingerprint}
            counts = np.diff(self._ends, prepend=0).astype(np.int32)
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                write_arrays(self._path, facts, {"num_packs": counts})
            except OSError as error:
                _log.warning("cannot write %s (%s); packs are counted again", self._path, error)
                self._path = None
        self._num_stored = len(self._ends)

    def _stored(self) -> NDArray[np.int32]:
        """Returns what the file holds for this plan; nothing when it is missing, damaged or another's."""
        nothing = np.empty(0, dtype=np.int32)
        if self._path is None:
            return nothing
        try:
            stored = open_arrays(self._path)
        except FileNotFoundError:
            return nothing
        except (OSError, ValueError) as error:
            _log.warning("table=%s cannot be read (%s); it is made again", self._path, error)
            return nothing
        expected = {"version": TABLE_VERSION, "fingerprint": self._fingerprint}
        if stored.facts != expected or "num_packs" not in stored.arrays:
            return nothing
        counts: NDArray[np.int32] = stored.arrays["num_packs"]
        return counts
