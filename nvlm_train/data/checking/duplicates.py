"""Duplicates inside the training data: the same bytes, the same words, the same looks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nvlm_train.data.checking.findings import MAX_EXAMPLES, Example, Findings
from nvlm_train.data.checking.shard import ShardPrints
from nvlm_train.data.checking.spill import SpilledTable

SAME = "duplicate sample"
SAME_WORDS = "near-duplicate sample"
SAME_LOOKS = "near-duplicate image"

Describe = Callable[[int], tuple[str, str]]
"""Returns the (shard, key) of a place."""


def places(rows: list[int], shard: int) -> NDArray[np.int64]:
    """Returns every (shard, row) as one number, a place."""
    return np.array(rows, dtype=np.int64) | (np.int64(shard) << 32)


def differing_bits(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Counts how many of the 64 bits differ: int64, broadcast like `a ^ b`."""
    # A table of 16-bit words: numpy counts bits itself only from version 2 on.
    words = np.ascontiguousarray(a ^ b)[..., None].view(np.uint16)
    bits: NDArray[np.int64] = _BITS[words].sum(axis=-1, dtype=np.int64)
    return bits


_BITS = np.array([number.bit_count() for number in range(1 << 16)], dtype=np.uint8)


class DuplicateTables:
    """Keeps the hashes of all training samples on disk and finds what they have in common.

    Near-duplicate images are pairs whose perceptual hashes differ in at most `distance` bits. Split
    into distance + 1 parts, such hashes agree in one part at least: only those are compared.
    """

    def __init__(self, directory: Path, distance: int) -> None:
        self._distance = distance
        self._exact = SpilledTable(directory, "exact")
        self._near = SpilledTable(directory, "near")
        self._images = SpilledTable(directory, "images")
        self._parts = SpilledTable(directory, "parts")
        self._flagged = SpilledTable(directory, "flagged")

    def add(self, prints: ShardPrints, shard: int) -> None:
        """Adds the hashes of one shard."""
        exact = np.array([each.hash for each in prints.exact], dtype=np.uint64)
        near = np.array([each.hash for each in prints.near], dtype=np.uint64)
        samples = places([each.row for each in prints.exact], shard)
        self._exact.add(exact, samples)
        self._near.add(near, samples, value=exact)
        content = np.array([each.content for each in prints.images], dtype=np.uint64)
        looks = np.array([each.looks for each in prints.images], dtype=np.uint64)
        where = places([each.row for each in prints.images], shard)
        self._images.add(content, where)
        for number in range(self._distance + 1):
            self._parts.add(self._part(looks, number), where, value=looks, other=content)

    def report(self, findings: Findings, describe: Describe) -> None:
        """Adds what was found to the findings."""
        for group in self._exact.groups():
            pairs = ((int(place), int(group["place"][0])) for place in group["place"][1:])
            findings.add(SAME, len(group) - 1, _examples(pairs, "equals", describe))
        for group in self._near.groups():
            _, first = np.unique(group["value"], return_index=True)
            kept = np.sort(group["place"][first]).tolist()
            pairs = ((place, kept[0]) for place in kept[1:])
            findings.add(SAME_WORDS, len(kept) - 1, _examples(pairs, "has the words of", describe))
        findings.shared_images = sum(
            len(np.unique(group["place"])) - 1 for group in self._images.groups()
        )
        self._report_looks(findings, describe)

    def _report_looks(self, findings: Findings, describe: Describe) -> None:
        """Adds every image that looks like another, counted once however many it looks like."""
        shown: dict[int, Example] = {}
        for rows in self._parts.buckets():
            files = _different_files(rows)
            later, earlier = close_rows(files, self._distance)
            where = files["place"]
            self._flagged.add(where[later].astype(np.uint64), where[later])
            bits = differing_bits(files["value"][later], files["value"][earlier])
            for number in range(len(later)):
                place = int(where[later[number]])
                if len(shown) == MAX_EXAMPLES:
                    break
                other = _name(int(where[earlier[number]]), describe)
                reason = f"looks like {other}: {bits[number]} of 64 bits differ"
                shown.setdefault(place, Example(*describe(place), reason))
        count = sum(len(np.unique(rows["place"])) for rows in self._flagged.buckets())
        findings.add(SAME_LOOKS, count, shown.values())

    def _part(self, looks: NDArray[np.uint64], number: int) -> NDArray[np.uint64]:
        """Returns part `number` of each hash, with the number in it."""
        count = self._distance + 1
        low, high = 64 * number // count, 64 * (number + 1) // count
        part = (looks >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
        # Parts of one number only meet each other: mixed, two numbers' values hardly ever agree.
        with np.errstate(over="ignore"):
            return part * np.uint64(2 * count + 1) + np.uint64(number)


def close_rows(
    files: NDArray[np.void], distance: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Finds rows that look like an earlier one of their key, and which one: two int64 [found].

    `files` are sorted by key and place. All pairs (i, i + 1) are compared at once, then all
    (i, i + 2), until no two rows so far apart share a key.
    """
    key, looks, place = files["key"], files["value"], files["place"]
    partner = np.full(len(files), -1, dtype=np.int64)
    first = np.arange(len(files), dtype=np.int64)
    for step in range(1, len(files)):
        first = first[first + step < len(files)]
        first = first[key[first] == key[first + step]]
        if len(first) == 0:
            break
        bits = differing_bits(looks[first], looks[first + step])
        close = first[(bits <= distance) & (place[first] != place[first + step])]
        partner[close + step] = close
    later = np.flatnonzero(partner >= 0)
    return later, partner[later]


def _different_files(rows: NDArray[np.void]) -> NDArray[np.void]:
    """Returns the first of the rows with equal key and content: copies are no near-duplicates."""
    order = np.lexsort((rows["place"], rows["other"], rows["key"]))
    ordered = rows[order]
    is_first = np.append(
        True,
        (ordered["key"][1:] != ordered["key"][:-1])
        | (ordered["other"][1:] != ordered["other"][:-1]),
    )
    kept: NDArray[np.void] = rows[np.sort(order[is_first])]
    return kept


def _examples(
    pairs: Iterator[tuple[int, int]], relation: str, describe: Describe
) -> Iterator[Example]:
    for number, (one, other) in enumerate(pairs):
        if number == MAX_EXAMPLES:
            return
        yield Example(*describe(one), f"{relation} {_name(other, describe)}")


def _name(place: int, describe: Describe) -> str:
    shard, key = describe(place)
    return f"{key} in {shard}"
