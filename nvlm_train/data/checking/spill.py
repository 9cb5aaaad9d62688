"""Rows grouped by key without holding them in memory: they wait in files, split by key."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ROW = np.dtype([("key", "<u8"), ("value", "<u8"), ("other", "<u8"), ("place", "<i8")])
"""32 bytes; what `value` and `other` hold is the table's own business."""

_BUCKETS = 64
_SHIFT = np.uint64(58)
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_ROWS_IN_MEMORY = 1 << 18

Rows = NDArray[np.void]


class SpilledTable:
    """Holds rows of `ROW`; `buckets()` brings all rows of a key together.

    Memory is that of the largest bucket, about a 64th of the table.
    """

    def __init__(self, directory: Path, name: str) -> None:
        self._stem = directory / name
        self._waiting: list[Rows] = []
        self._num_waiting = 0

    def add(
        self,
        key: NDArray[np.uint64],
        place: NDArray[np.int64],
        value: NDArray[np.uint64] | int = 0,
        other: NDArray[np.uint64] | int = 0,
    ) -> None:
        """Adds rows, given as columns."""
        rows = np.empty(len(key), dtype=ROW)
        rows["key"], rows["value"], rows["other"], rows["place"] = key, value, other, place
        self._waiting.append(rows)
        self._num_waiting += len(rows)
        if self._num_waiting > _ROWS_IN_MEMORY:
            self._spill()

    def buckets(self) -> Iterator[Rows]:
        """Yields all rows, sorted by key and place inside a bucket; a key is in one bucket only."""
        self._spill()
        for bucket in range(_BUCKETS):
            path = self._path(bucket)
            if path.exists():
                rows = np.fromfile(path, dtype=ROW)
                yield rows[np.lexsort((rows["place"], rows["key"]))]

    def groups(self) -> Iterator[Rows]:
        """Yields the rows that share a key, two or more, by place."""
        for rows in self.buckets():
            starts = np.flatnonzero(np.append(True, rows["key"][1:] != rows["key"][:-1]))
            ends = np.append(starts[1:], len(rows))
            for index in np.flatnonzero(ends - starts > 1).tolist():
                yield rows[starts[index] : ends[index]]

    def _path(self, bucket: int) -> Path:
        return self._stem.with_name(f"{self._stem.name}.{bucket:02d}")

    def _spill(self) -> None:
        if not self._waiting:
            return
        rows = np.concatenate(self._waiting)
        self._waiting, self._num_waiting = [], 0
        with np.errstate(over="ignore"):
            owners = (rows["key"] * _FACTOR) >> _SHIFT
        for bucket in np.unique(owners).tolist():
            with self._path(bucket).open("ab") as stream:
                stream.write(rows[owners == bucket].tobytes())
