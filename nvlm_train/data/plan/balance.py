"""Evens loads out: samples over packs, and packs over data-parallel ranks. Pure arithmetic.

Shape legend: N items, G groups, M measures (tokens, tiles, attention: whatever shall be even).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SLACK = 0.01
"""A load within this of the mean is even enough: measures that come later may use what is left of it."""


_LEAST = 8
"""So many of the least loaded groups are looked at first: nearly always one of them has a swap."""
_MOST = 32
"""So many are looked at at all: with thousands of samples a step, looking at each would take a second."""


class _Swap(NamedTuple):
    """Two items that change places."""

    given: int
    """The most loaded group's."""
    taken: int
    """Another group's."""


def even_out(
    groups: list[list[int]], sizes_NM: NDArray[np.int64], ceilings: Sequence[int | None] = ()
) -> None:
    """Swaps items between groups, one for one, while that lowers the highest load. Changes `groups`.

    The first measure comes first: a swap for a later one may not raise the highest load of an earlier one
    above its mean by more than `SLACK`, or above what it is.

    Args:
        groups: the items of each; every item is in one.
        sizes_NM: what each item adds to the load, in the order of importance.
        ceilings: what a group's load may not exceed, by measure; none, or None, where there is no limit.
    """
    loads_GM = np.array([sizes_NM[own].sum(axis=0) for own in groups], dtype=np.int64)
    allowed_M = np.full(sizes_NM.shape[1], np.iinfo(np.int64).max)
    for measure, ceiling in enumerate(ceilings):
        if ceiling is not None:
            allowed_M[measure] = ceiling
    for measure in range(sizes_NM.shape[1]):
        enough = int(loads_GM[:, measure].sum() / len(groups) * (1 + SLACK))
        for _ in range(len(sizes_NM)):
            high = int(loads_GM[:, measure].argmax())
            if loads_GM[high, measure] <= enough:
                break
            swap = _best_swap(groups, loads_GM, sizes_NM, allowed_M, measure)
            if swap is None:
                break
            _apply(swap, groups, loads_GM, sizes_NM)
        highest = max(enough, int(loads_GM[:, measure].max()))
        allowed_M[measure] = min(int(allowed_M[measure]), highest)


def _best_swap(
    groups: list[list[int]],
    loads_GM: NDArray[np.int64],
    sizes_NM: NDArray[np.int64],
    allowed_M: NDArray[np.int64],
    measure: int,
) -> _Swap | None:
    """Returns a swap that lowers the highest load, with one of the least loaded groups where one does."""
    order = np.argsort(loads_GM[:, measure], kind="stable")
    high, others = int(loads_GM[:, measure].argmax()), order[order != loads_GM[:, measure].argmax()]
    for low in (others[:_LEAST], others[_LEAST:_MOST]):
        swap = _best_with(low.tolist(), high, groups, loads_GM, sizes_NM, allowed_M, measure)
        if swap is not None:
            return swap
    return None


def _best_with(
    low: list[int],
    high: int,
    groups: list[list[int]],
    loads_GM: NDArray[np.int64],
    sizes_NM: NDArray[np.int64],
    allowed_M: NDArray[np.int64],
    measure: int,
) -> _Swap | None:
    """Returns the swap with these groups after which the larger of the two loads is least, if it is lower."""
    mine = np.array(groups[high], dtype=np.int64)
    others = np.array([item for group in low for item in groups[group]], dtype=np.int64)
    if len(mine) == 0 or len(others) == 0:
        return None
    places = np.repeat(low, [len(groups[group]) for group in low])
    moved = sizes_NM[mine][:, None] - sizes_NM[others][None]
    loads = np.maximum(loads_GM[high] - moved, loads_GM[places][None] + moved)
    is_allowed = (loads <= allowed_M).all(axis=-1) & (moved[..., measure] > 0)
    worse = np.where(is_allowed, loads[..., measure], np.iinfo(np.int64).max)
    best = int(worse.argmin())
    if worse.flat[best] >= loads_GM[high, measure]:
        return None
    given, taken = divmod(best, len(others))
    return _Swap(int(mine[given]), int(others[taken]))


def _apply(
    swap: _Swap,
    groups: list[list[int]],
    loads_GM: NDArray[np.int64],
    sizes_NM: NDArray[np.int64],
) -> None:
    high, low = (next(group for group, own in enumerate(groups) if item in own) for item in swap)
    moved_M = sizes_NM[swap.given] - sizes_NM[swap.taken]
    groups[high][groups[high].index(swap.given)] = swap.taken
    groups[low][groups[low].index(swap.taken)] = swap.given
    loads_GM[high] -= moved_M
    loads_GM[low] += moved_M
