"""Weighted blends: which source each draw comes from, and which sample a source's k-th draw is.

Draws are numbered from 0 for a whole stage and nothing is remembered between them: any draw of any
step is named by arithmetic, without those before it.

Shape legend: N draws.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from nvlm_train.batch import SampleRef
from nvlm_train.data.ordering import hashed_permutation, stable_hash
from nvlm_train.data.plan.sources import Source

BLOCK = 1000
"""Draws among which the sources are shuffled; shares are exact to a few draws at a block's end."""

SHARD_WINDOW = 8
"""Shards whose samples are shuffled together in an epoch; others are not read meanwhile."""

_WEIGHT_UNITS = 1 << 40


def split_draws(num_draws: int, units: Sequence[int]) -> list[int]:
    """Splits `num_draws` in the proportions of `units`, to a few draws.

    One draw more adds one to one part.

    The sources are halved and the first half's share is rounded, again and again: so a part never
    shrinks when `num_draws` grows, which rounding all shares side by side would not give.

    >>> split_draws(10, [3, 1, 1])
    [6, 2, 2]
    """
    if len(units) == 1:
        return [num_draws]
    half = len(units) // 2
    total = sum(units)
    first = (2 * num_draws * sum(units[:half]) + total) // (2 * total)
    return split_draws(first, units[:half]) + split_draws(num_draws - first, units[half:])


@dataclass(frozen=True)
class _Phase:
    """A stretch of draws between two departures of sources."""

    first: int
    drawn: tuple[int, ...]
    """Draws of every source before `first`."""
    present: tuple[int, ...]
    """Sources that still give samples."""


class BlendOrder:
    """Says for draw i of a blend which source it comes from, and which draw of that source it is.

    A source with a limit leaves after its last draw; the others keep their proportions.
    """

    def __init__(
        self, weights: Sequence[float], seed: int, limits: Sequence[int | None] | None = None
    ) -> None:
        total = sum(weights)
        # Integers, so that sums over millions of draws are exact and equal on every machine.
        self._units = [max(1, round(weight / total * _WEIGHT_UNITS)) for weight in weights]
        self._limits = [None] * len(weights) if limits is None else list(limits)
        self._seed = seed
        self._phases = [_Phase(0, (0,) * len(weights), tuple(range(len(weights))))]
        while any(self._limits[source] is not None for source in self._phases[-1].present):
            self._phases.append(self._next_phase(self._phases[-1]))
        self._block = lru_cache(maxsize=64)(self._make_block)

    @property
    def num_draws(self) -> int | None:
        """Draws until every source has left; None when one has no limit."""
        last = self._phases[-1]
        return None if last.present else last.first

    def draws(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns the source of draws [start, stop), and which of its draws: two int64 [stop - start].

        Draws after the blend's last are left out.
        """
        blocks = [self._block(number) for number in range(start // BLOCK, -(-stop // BLOCK))]
        skip = start - start // BLOCK * BLOCK
        sources = np.concatenate([block[0] for block in blocks])[skip : skip + stop - start]
        numbers = np.concatenate([block[1] for block in blocks])[skip : skip + stop - start]
        return sources, numbers

    def drawn_before(self, draw: int) -> tuple[int, ...]:
        """Returns how many of the blend's first `draw` draws come from each source."""
        phase = self._phases[bisect_right(self._phases, draw, key=lambda phase: phase.first) - 1]
        return self._drawn(phase, draw - phase.first)

    def _drawn(self, phase: _Phase, num_draws: int) -> tuple[int, ...]:
        """Returns the draws of each source up to `num_draws` after the phase's first."""
        drawn = list(phase.drawn)
        if phase.present:
            units = [self._units[source] for source in phase.present]
            for source, count in zip(phase.present, split_draws(num_draws, units), strict=True):
                drawn[source] += count
        return tuple(drawn)

    def _next_phase(self, phase: _Phase) -> _Phase:
        """Returns the phase after the draw at which the next source has given all that it may."""
        long_enough = 1
        while not self._full(self._drawn(phase, long_enough), phase):
            long_enough *= 2
        length = bisect_right(
            range(long_enough + 1),
            0,
            key=lambda draws: len(self._full(self._drawn(phase, draws), phase)),
        )
        drawn = self._drawn(phase, length)
        left = self._full(drawn, phase)
        present = tuple(source for source in phase.present if source not in left)
        return _Phase(phase.first + length, drawn, present)

    def _full(self, drawn: Sequence[int], phase: _Phase) -> list[int]:
        """Returns the sources of the phase that have reached their limits."""
        found = []
        for source in phase.present:
            limit = self._limits[source]
            if limit is not None and drawn[source] >= limit:
                found.append(source)
        return found

    def _make_block(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        before = self.drawn_before(block * BLOCK)
        after = self.drawn_before((block + 1) * BLOCK)
        counts = [last - first for first, last in zip(before, after, strict=True)]
        order = hashed_permutation(sum(counts), stable_hash("blend", self._seed, block))
        sources = np.repeat(np.arange(len(counts), dtype=np.int64), counts)[order]
        numbers = np.empty(len(sources), dtype=np.int64)
        for source, (first, count) in enumerate(zip(before, counts, strict=True)):
            numbers[sources == source] = np.arange(first, first + count)
        return sources, numbers


class SourceOrder:
    """Says for draw k of a source which sample it is: (shard, row), each once per epoch.

    Each epoch permutes the shards, then the samples inside each window of shards.

    Args:
        num_usable: int64 [shards], usable samples of each.
        rows_of: a shard's usable rows, asked for when its window comes.
    """

    def __init__(
        self,
        num_usable: NDArray[np.int64],
        rows_of: Callable[[int], NDArray[np.int64]],
        *salt: str | int,
    ) -> None:
        self._counts = num_usable
        self._rows_of = rows_of
        self._salt = salt
        self.num_usable = int(num_usable.sum())
        # Two: one that ends and the one after it.
        self._windows = lru_cache(maxsize=2)(self._make_windows)
        self._window = lru_cache(maxsize=2)(self._make_window)

    def locate(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns shards and rows of the source's draws [start, stop): two int64 [stop - start]."""
        parts: list[NDArray[np.int64]] = [np.empty((2, 0), dtype=np.int64)]
        while start < stop:
            epoch, position = divmod(start, self.num_usable)
            order, ends = self._windows(epoch)
            window = int(np.searchsorted(ends, position, side="right"))
            places, rows = self._window(epoch, window)
            first = position - (int(ends[window]) - len(rows))
            found = slice(first, first + stop - start)
            shards = order[window * SHARD_WINDOW + places[found].astype(np.int64)]
            parts.append(np.stack([shards, rows[found].astype(np.int64)]))
            start += len(shards)
        shards, rows = np.concatenate(parts, axis=1)
        return shards, rows

    def _make_windows(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns the epoch's order of shards, and the samples up to each window's end."""
        order = hashed_permutation(len(self._counts), stable_hash("shards", epoch, *self._salt))
        sizes = self._counts[order]
        return order, np.cumsum(np.add.reduceat(sizes, np.arange(0, len(sizes), SHARD_WINDOW)))

    def _make_window(self, epoch: int, window: int) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
        """Returns the window's samples in their order: (shard's place in the window, row) of each.

        Narrow types: a window of large shards is all that a source keeps per sample.
        """
        order, _ = self._windows(epoch)
        shards = order[window * SHARD_WINDOW : (window + 1) * SHARD_WINDOW]
        places = np.repeat(np.arange(len(shards), dtype=np.uint8), self._counts[shards])
        rows = np.concatenate([self._rows_of(int(shard)).astype(np.int32) for shard in shards])
        shuffled = hashed_permutation(len(rows), stable_hash("samples", epoch, window, *self._salt))
        return places[shuffled], rows[shuffled]


@dataclass(frozen=True)
class Draws:
    """Samples in the order in which they are drawn: the fields of `SampleRef`, each int64 [N]."""

    source: NDArray[np.int64]
    shard: NDArray[np.int64]
    row: NDArray[np.int64]
    num_tokens: NDArray[np.int64]
    num_tiles: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.source)

    def refs(self) -> list[SampleRef]:
        """Returns the samples one by one."""
        columns = (self.source, self.shard, self.row, self.num_tokens, self.num_tiles)
        return [SampleRef(*fields) for fields in zip(*(c.tolist() for c in columns), strict=True)]


class Blender:
    """Says for draw i of a stage which sample it is: a blend's order and those of its sources."""

    def __init__(self, sources: Sequence[Source], seed: int) -> None:
        self._sources = sources
        self._blend = BlendOrder(
            [source.weight for source in sources], seed, [source.max_draws for source in sources]
        )
        self._orders = [_order(source, seed) for source in sources]

    @property
    def num_draws(self) -> int | None:
        """Draws until every source has left; None when one has no limit."""
        return self._blend.num_draws

    def draw(self, start: int, stop: int) -> Draws:
        """Returns draws [start, stop); those after the blend's last are left out."""
        sources, numbers = self._blend.draws(start, stop)
        shards, rows, tokens, tiles = np.empty((4, len(sources)), dtype=np.int64)
        for number, order in enumerate(self._orders):
            places = np.flatnonzero(sources == number)
            if len(places) == 0:
                continue
            # A source's draws inside a range of the blend follow each other.
            first = int(numbers[places[0]])
            shards[places], rows[places] = order.locate(first, first + len(places))
            for shard in np.unique(shards[places]).tolist():
                own = places[shards[places] == shard]
                lengths = self._sources[number].lengths[shard]
                tokens[own] = lengths.num_tokens[rows[own]]
                tiles[own] = lengths.num_tiles[rows[own]]
        return Draws(sources, shards, rows, tokens, tiles)


def _order(source: Source, seed: int) -> SourceOrder:
    lengths = source.lengths
    return SourceOrder(
        source.table.num_usable, lambda shard: lengths[shard].usable_rows(), seed, source.name
    )
