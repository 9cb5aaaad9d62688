"""Samples into packs, and packs onto data-parallel ranks. Pure arithmetic.

Shape legend: N samples, M measures.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray

from nvlm_train.batch import PackPlan
from nvlm_train.data.plan.attention_cost import SELF_ATTENTION, AttentionCost
from nvlm_train.data.plan.balance import even_out
from nvlm_train.geometry import length_for


@dataclass(frozen=True)
class Packing:
    """What packs are like, besides the batch."""

    lengths: tuple[int, ...]
    """They are filled up to one of these, ascending; the last one bounds what they hold. [tokens]"""
    attention: AttentionCost = SELF_ATTENTION
    """It makes one pack dearer than another of equal length."""

    @property
    def most_tokens(self) -> int:
        """The most tokens that a pack holds."""
        return self.lengths[-1]


@dataclass(frozen=True, eq=False)
class SampleSizes:
    """The numbers of samples that packs share: int64 [N] each."""

    tokens: NDArray[np.int64]
    tiles: NDArray[np.int64]
    attention: NDArray[np.int64]
    """In the units of `AttentionCost`."""


def best_fit_decreasing(
    lengths: Sequence[int],
    capacity: int,
    tiles: Sequence[int] | None = None,
    max_tiles: int | None = None,
) -> list[list[int]]:
    """Groups the indices of `lengths` so that no group is longer than `capacity`.

    The longest come first, each into the fullest group that still has room; ties are by index. With
    `max_tiles` no group has more tiles either, and what takes the larger part of its limit is first.

    >>> best_fit_decreasing([4, 6, 3, 5], 10)
    [[1, 0], [3, 2]]
    >>> best_fit_decreasing([4, 6, 3, 5], 10, [1, 2, 1, 1], 2)
    [[1], [0, 2], [3]]

    Raises:
        ValueError: a length larger than the capacity, or a sample of more tiles than `max_tiles`.
    """
    if max(lengths, default=0) > capacity:
        raise ValueError(f"sample of {max(lengths)} tokens does not fit a pack of {capacity}")
    if tiles is None or max_tiles is None:
        return _by_tokens(lengths, capacity)
    if max(tiles, default=0) > max_tiles:
        raise ValueError(f"sample of {max(tiles)} tiles does not fit a pack of {max_tiles} tiles")
    return _by_both(lengths, capacity, tiles, max_tiles)


def _by_tokens(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    groups: list[list[int]] = []
    room: list[int] = []  # free * unit + group, ascending: one number compares faster than two
    unit = len(lengths) + 1
    negative = [-length for length in lengths]
    for index in sorted(range(len(lengths)), key=negative.__getitem__):
        length = lengths[index]
        place = bisect_left(room, length * unit)
        if place == len(room):
            insort(room, (capacity - length) * unit + len(groups))
            groups.append([index])
        else:
            best = room.pop(place)
            groups[best % unit].append(index)
            insort(room, best - length * unit)
    return groups


def _by_both(
    lengths: Sequence[int], capacity: int, tiles: Sequence[int], max_tiles: int
) -> list[list[int]]:
    groups: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free, group), ascending
    free_tiles: list[int] = []

    def size(index: int) -> tuple[int, int]:
        return -max(lengths[index] * max_tiles, tiles[index] * capacity), index

    for index in sorted(range(len(lengths)), key=size):
        length, needed = lengths[index], tiles[index]
        place = bisect_left(room, (length, -1))
        while place < len(room) and free_tiles[room[place][1]] < needed:
            place += 1
        if place == len(room):
            free, group = capacity, len(groups)
            groups.append([])
            free_tiles.append(max_tiles)
        else:
            free, group = room.pop(place)
        groups[group].append(index)
        free_tiles[group] -= needed
        insort(room, (free - length, group))
    return groups


def spread(
    groups: Sequence[Sequence[int]],
    num_groups: int,
    samples: SampleSizes,
    lengths: Sequence[int],
    max_tiles: int | None,
) -> list[list[int]]:
    """Spreads samples over more groups, or as many, so that all groups are alike.

    Best fit makes the fewest groups: full ones, a last one that is nearly empty, and long samples beside
    long ones. Packs of a step are filled up to one length, that of the longest, and the slowest decides how
    long the others wait. So each sample, the largest first, goes to the group that has least; then samples
    are swapped and moved (`even_out`), first for a short length of the packs, then within that length for
    tiles and attention. Where that does not fit, the given groups are the start.

    Args:
        groups: of `best_fit_decreasing`.
        num_groups: this many are made, if there are as many samples.
        samples: their sizes.
        lengths: of packs, ascending.
        max_tiles: of a group; None for no limit.
    """
    sizes_NM = np.stack([samples.tokens, samples.tiles, samples.attention], axis=1)
    total = len(sizes_NM)
    num_groups = max(len(groups), min(num_groups, total))
    found = _least_first(num_groups, sizes_NM, (lengths[-1], max_tiles))
    if found is None:
        found = [list(group) for group in groups]
        found += [[] for _ in range(num_groups - len(groups))]
    # An item of no size in each group: to swap a sample with it moves the sample.
    for number, group in enumerate(found):
        group.append(total + number)
    nothing = np.zeros((num_groups, sizes_NM.shape[1]), dtype=np.int64)
    sizes_NM = np.concatenate([sizes_NM, nothing])
    even_out(found, sizes_NM[:, :2], (lengths[-1], max_tiles))
    longest = max(int(sizes_NM[group, 0].sum()) for group in found)
    by_importance = sizes_NM[:, [1, 2, 0]]
    even_out(found, by_importance, (max_tiles, None, length_for(longest, lengths)))
    kept = [sorted(index for index in group if index < total) for group in found]
    return [group for group in kept if group]


def _least_first(
    num_groups: int, sizes_NM: NDArray[np.int64], ceilings: Sequence[int | None]
) -> list[list[int]] | None:
    """Gives each sample, the largest first, to the group with the least; None when one fits nowhere."""
    shares_N = (sizes_NM / np.maximum(sizes_NM.sum(axis=0), 1)).sum(axis=1).tolist()
    limits = [(m, ceiling) for m, ceiling in enumerate(ceilings) if ceiling is not None]
    sizes = sizes_NM.tolist()
    groups: list[list[int]] = [[] for _ in range(num_groups)]
    loads = [[0] * sizes_NM.shape[1] for _ in range(num_groups)]
    least = [(0.0, group) for group in range(num_groups)]
    for index in sorted(range(len(sizes)), key=lambda index: (-shares_N[index], index)):
        passed = []
        while least:
            load, group = heappop(least)
            if all(loads[group][m] + sizes[index][m] <= ceiling for m, ceiling in limits):
                break
            passed.append((load, group))
        else:
            return None
        groups[group].append(index)
        loads[group] = [load + size for load, size in zip(loads[group], sizes[index], strict=True)]
        for each in [*passed, (load + shares_N[index], group)]:
            heappush(least, each)
    return groups


def deal(
    packs: Sequence[PackPlan], num_ranks: int, attention: AttentionCost = SELF_ATTENTION
) -> tuple[tuple[PackPlan, ...], ...]:
    """Deals the packs to the ranks: equally many (to one), then tiles, attention and tokens balanced.

    Every pack is padded to the same length, so that what the language model does with each token is the
    same whatever a pack holds: the number of packs decides, then the tiles to encode, then what attention
    computes, which grows with the square of a sample's length. A rank left without a pack gets an empty
    one.
    """
    fewest, with_one_more = divmod(len(packs), num_ranks)
    tiles, tokens = [p.num_tiles for p in packs], [p.num_tokens for p in packs]
    dealt: list[list[int]] = [[] for _ in range(num_ranks)]
    load = [(0, 0)] * num_ranks
    for index in sorted(range(len(packs)), key=lambda i: (-tiles[i], -tokens[i], i)):
        full_ranks = sum(len(own) > fewest for own in dealt)
        limit = fewest + (full_ranks < with_one_more)
        rank = min(
            (r for r in range(num_ranks) if len(dealt[r]) < limit), key=lambda r: (load[r], r)
        )
        dealt[rank].append(index)
        load[rank] = (load[rank][0] + tiles[index], load[rank][1] + tokens[index])
    costs = [attention.of_pack(pack) for pack in packs]
    even_out(dealt, np.array([tiles, costs, tokens], dtype=np.int64).T)
    return tuple(tuple(packs[index] for index in sorted(own)) or (PackPlan(()),) for own in dealt)
