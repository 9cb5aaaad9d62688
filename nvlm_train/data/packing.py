"""Samples into packs of one fixed length, and packs onto data-parallel ranks. Pure arithmetic."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

from nvlm_train.batch import PackPlan


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` grouped so that no group's sum is larger than `capacity`.

    Longest first, each into the fullest group that still has room; ties by index.

    >>> best_fit_decreasing([4, 6, 3, 5], 10)
    [[1, 0], [3, 2]]

    Raises:
        ValueError: a length larger than the capacity.
    """
    groups: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free, group), ascending
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length = lengths[index]
        if length > capacity:
            raise ValueError(f"sample of {length} tokens does not fit a pack of {capacity}")
        place = bisect_left(room, (length, -1))
        if place == len(room):
            groups.append([index])
            insort(room, (capacity - length, len(groups) - 1))
        else:
            free, group = room.pop(place)
            groups[group].append(index)
            insort(room, (free - length, group))
    return groups


def deal(packs: Sequence[PackPlan], num_ranks: int) -> tuple[tuple[PackPlan, ...], ...]:
    """Packs of each rank: equally many (to one), tiles balanced before tokens.

    Every pack is padded to the same length, so its language-model work is the same whatever it
    holds: the number of packs decides, then the tiles to encode. A rank left without a pack gets
    an empty one. Which packs there are does not depend on `num_ranks`.
    """
    fewest, with_one_more = divmod(len(packs), num_ranks)
    dealt: list[list[int]] = [[] for _ in range(num_ranks)]
    load = [(0, 0)] * num_ranks
    order = sorted(range(len(packs)), key=lambda i: (-packs[i].num_tiles, -packs[i].num_tokens, i))
    for index in order:
        full_ranks = sum(len(own) > fewest for own in dealt)
        limit = fewest + (full_ranks < with_one_more)
        rank = min(
            (r for r in range(num_ranks) if len(dealt[r]) < limit), key=lambda r: (load[r], r)
        )
        dealt[rank].append(index)
        tiles, tokens = load[rank]
        load[rank] = (tiles + packs[index].num_tiles, tokens + packs[index].num_tokens)
    return tuple(tuple(packs[index] for index in sorted(own)) or (PackPlan(()),) for own in dealt)
