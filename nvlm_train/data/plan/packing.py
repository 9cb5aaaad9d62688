"""Samples into packs of one fixed length, and packs onto data-parallel ranks. Pure arithmetic."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

from nvlm_train.batch import PackPlan


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


def deal(packs: Sequence[PackPlan], num_ranks: int) -> tuple[tuple[PackPlan, ...], ...]:
    """Deals the packs to the ranks: equally many (to one), tiles balanced before tokens.

    Every pack is padded to the same length, so its language-model work is the same whatever it
    holds: the number of packs decides, then the tiles to encode. A rank left without a pack gets
    an empty one. Which packs there are does not depend on `num_ranks`.
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
    _even_out(dealt, tiles)
    _even_out(dealt, tokens, tiles)
    return tuple(tuple(packs[index] for index in sorted(own)) or (PackPlan(()),) for own in dealt)


class _Swap(NamedTuple):
    """Two packs that change places."""

    rank: int
    """The other rank."""
    given: int
    """The pack's place here."""
    taken: int
    """The pack's place on the other rank."""


def _even_out(
    dealt: list[list[int]], costs: Sequence[int], unchanged: Sequence[int] | None = None
) -> None:
    """Swaps packs of the most loaded rank while that lowers the load; counts of packs stay.

    With `unchanged` only packs that are equal in it are swapped.
    """
    loads = [sum(costs[index] for index in own) for own in dealt]
    most_swaps = sum(len(own) for own in dealt)
    for _ in range(most_swaps):
        high = max(range(len(dealt)), key=lambda rank: (loads[rank], -rank))
        swap = _best_swap(dealt, loads, high, costs, unchanged)
        if swap is None:
            return
        mine, others = dealt[high], dealt[swap.rank]
        moved = costs[mine[swap.given]] - costs[others[swap.taken]]
        mine[swap.given], others[swap.taken] = others[swap.taken], mine[swap.given]
        loads[high] -= moved
        loads[swap.rank] += moved


def _best_swap(
    dealt: list[list[int]],
    loads: Sequence[int],
    high: int,
    costs: Sequence[int],
    unchanged: Sequence[int] | None,
) -> _Swap | None:
    """Returns the swap after which the larger load is least; None when no swap lowers it."""
    best, found = loads[high], None
    for rank in sorted(range(len(dealt)), key=lambda rank: (loads[rank], rank)):
        # Less than half the difference cannot be reached by any swap.
        if max(loads[rank], (loads[high] + loads[rank] + 1) // 2) >= best:
            break
        for given, mine in enumerate(dealt[high]):
            for taken, other in enumerate(dealt[rank]):
                moved = costs[mine] - costs[other]
                if moved <= 0 or (unchanged and unchanged[mine] != unchanged[other]):
                    continue
                worse = max(loads[high] - moved, loads[rank] + moved)
                if worse < best:
                    best, found = worse, _Swap(rank, given, taken)
    return found
