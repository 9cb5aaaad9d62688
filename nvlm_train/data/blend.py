"""Weighted blends: which source each draw comes from, and where its k-th draw lies.

Draws are numbered from 0 for a whole stage and nothing is remembered between them, so any draw of
any step can be named without those before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from nvlm_train.data.ordering import hashed_permutation, stable_hash

BLOCK = 1000
"""Draws among which the sources are shuffled; shares are exact to one draw at every block's end."""

SHARD_WINDOW = 8
"""Shards whose samples are shuffled together in an epoch; others are not read meanwhile."""

_WEIGHT_UNITS = 1 << 40


class BlendOrder:
    """Draw i of a blend -> (source, which draw of that source)."""

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        total = sum(weights)
        # Integers, so that sums over millions of draws are exact and equal on every machine.
        self._units = [max(1, round(weight / total * _WEIGHT_UNITS)) for weight in weights]
        self._total = sum(self._units)
        self._seed = seed
        self._before: list[tuple[int, ...]] = [(0,) * len(weights)]
        self._block = lru_cache(maxsize=64)(self._make_block)

    def draws(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Sources and per-source draw numbers of draws [start, stop): two int64 [stop - start]."""
        blocks = [self._block(number) for number in range(start // BLOCK, -(-stop // BLOCK))]
        skip = start - start // BLOCK * BLOCK
        sources = np.concatenate([block[0] for block in blocks])[skip : skip + stop - start]
        numbers = np.concatenate([block[1] for block in blocks])[skip : skip + stop - start]
        return sources, numbers

    def _make_block(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        before, after = self._drawn_before(block), self._drawn_before(block + 1)
        counts = [last - first for first, last in zip(before, after, strict=True)]
        order = hashed_permutation(BLOCK, stable_hash("blend", self._seed, block))
        sources = np.repeat(np.arange(len(counts), dtype=np.int64), counts)[order]
        numbers = np.empty(BLOCK, dtype=np.int64)
        for source, (first, count) in enumerate(zip(before, counts, strict=True)):
            numbers[sources == source] = np.arange(first, first + count)
        return sources, numbers

    def _drawn_before(self, block: int) -> tuple[int, ...]:
        """Draws of each source before the block; the table grows as far as it was asked for."""
        while len(self._before) <= block:
            self._before.append(self._next_counts(self._before[-1]))
        return self._before[block]

    def _next_counts(self, before: tuple[int, ...]) -> tuple[int, ...]:
        """Gives the next block's draws to the sources that lag most behind their share."""
        drawn = sum(before) + BLOCK
        due = [
            drawn * unit - self._total * count
            for unit, count in zip(self._units, before, strict=True)
        ]
        counts = [max(0, lag // self._total) for lag in due]
        remainders = [lag - self._total * count for lag, count in zip(due, counts, strict=True)]
        by_need = sorted(range(len(due)), key=lambda source: (-remainders[source], source))
        missing = BLOCK - sum(counts)
        for source in by_need[: max(0, missing)]:
            counts[source] += 1
        # Sources that ran ahead before can leave the others' whole parts one or two too many.
        surplus = [source for source in reversed(by_need) if counts[source] > 0]
        for source in surplus[: max(0, -missing)]:
            counts[source] -= 1
        return tuple(first + count for first, count in zip(before, counts, strict=True))


class SourceOrder:
    """Draw k of a source -> (shard, row): every usable sample once per epoch.

    Each epoch permutes the shards, then the samples inside each window of shards.
    """

    def __init__(self, usable_rows: Sequence[NDArray[np.int64]], *salt: str | int) -> None:
        self._usable = usable_rows
        self._salt = salt
        self.num_usable = sum(len(rows) for rows in usable_rows)
        self._windows = lru_cache(maxsize=4)(self._make_windows)
        self._window = lru_cache(maxsize=4)(self._make_window)

    def locate(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Shards and rows of the source's draws [start, stop): two int64 [stop - start]."""
        parts: list[NDArray[np.int64]] = [np.empty((2, 0), dtype=np.int64)]
        while start < stop:
            epoch, position = divmod(start, self.num_usable)
            _, ends = self._windows(epoch)
            window = int(np.searchsorted(ends, position, side="right"))
            places = self._window(epoch, window)
            first = position - (int(ends[window]) - places.shape[1])
            part = places[:, first : first + stop - start]
            parts.append(part)
            start += part.shape[1]
        shards, rows = np.concatenate(parts, axis=1)
        return shards, rows

    def _make_windows(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The epoch's order of shards, and the samples up to each window's end."""
        order = hashed_permutation(len(self._usable), stable_hash("shards", epoch, *self._salt))
        sizes = np.array([len(self._usable[shard]) for shard in order], dtype=np.int64)
        return order, np.cumsum(np.add.reduceat(sizes, np.arange(0, len(sizes), SHARD_WINDOW)))

    def _make_window(self, epoch: int, window: int) -> NDArray[np.int64]:
        """(shard, row) of the window's samples in their order: int64 [2, samples]."""
        order, _ = self._windows(epoch)
        shards = order[window * SHARD_WINDOW : (window + 1) * SHARD_WINDOW]
        owners = np.repeat(shards, [len(self._usable[shard]) for shard in shards])
        rows = np.concatenate([self._usable[shard] for shard in shards])
        shuffled = hashed_permutation(len(rows), stable_hash("samples", epoch, window, *self._salt))
        return np.stack([owners[shuffled], rows[shuffled]])
