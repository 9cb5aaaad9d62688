"""Who sees what, as one interval of keys for each query: all that a pack's masks are, on the host.

A token of a sample sees its sample up to itself; in cross-attention, the part of the context that its
span says, or nothing.

Shape legend: Q queries, K keys, I and J their blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nvlm_train.device_batch import Spans

BLOCK = 128
"""Queries, and keys, of a block. Kernels skip blocks in which no query sees a key."""


class Intervals(NamedTuple):
    """Query q sees keys [first[q], last[q])."""

    first_Q: NDArray[np.int32]
    last_Q: NDArray[np.int32]
    num_keys: int

    def of_rows(self, rows: Sequence[int]) -> Intervals:
        """Returns the intervals of some of the queries."""
        chosen = np.asarray(rows, dtype=np.int64)
        return Intervals(self.first_Q[chosen], self.last_Q[chosen], self.num_keys)

    @property
    def sees_Q(self) -> NDArray[np.float32]:
        """1 where a query sees anything, 0 elsewhere."""
        return (self.last_Q > self.first_Q).astype(np.float32)


def of_segments(lengths: Sequence[int]) -> Intervals:
    """Returns what tokens see of their own pack: each its segment, up to itself."""
    counts = np.asarray(lengths, dtype=np.int64)
    starts = np.repeat(counts.cumsum() - counts, counts)
    total = len(starts)
    return Intervals(starts.astype(np.int32), np.arange(1, total + 1, dtype=np.int32), total)


def of_spans(spans: Spans, num_queries: int, num_keys: int) -> Intervals:
    """Returns what tokens see of the context."""
    first_Q, last_Q = np.zeros((2, num_queries), dtype=np.int32)
    for start, stop, first, last in spans:
        first_Q[start:stop] = first
        last_Q[start:stop] = last
    return Intervals(first_Q, last_Q, num_keys)


class Blocks(NamedTuple):
    """Which blocks of keys a block of queries meets, as torch's BlockMask has them (int32, its names).

    `num` counts, `indices` lists them first, then the others. Partial blocks are masked key by key, full
    ones are not.
    """

    kv_num_blocks: NDArray[np.int32]
    """[1, 1, I]."""
    kv_indices: NDArray[np.int32]
    """[1, 1, I, J]."""
    full_kv_num_blocks: NDArray[np.int32]
    full_kv_indices: NDArray[np.int32]
    q_num_blocks: NDArray[np.int32]
    """[1, 1, J]: the other way round, for backward."""
    q_indices: NDArray[np.int32]
    """[1, 1, J, I]."""
    full_q_num_blocks: NDArray[np.int32]
    full_q_indices: NDArray[np.int32]


def blocks_of(intervals: Intervals) -> Blocks:
    """Sorts pairs of blocks into empty, partial and full ones, without a matrix of queries and keys."""
    first_Q, last_Q = (each.astype(np.int64) for each in intervals[:2])
    num_blocks = -(-intervals.num_keys // BLOCK)
    sees_Q = last_Q > first_Q
    # The last block of keys may be short: it is full when its last key is seen.
    stop_Q = np.where(last_Q == intervals.num_keys, num_blocks, last_Q // BLOCK)
    seen_IJ = _count(first_Q // BLOCK, np.where(sees_Q, -(-last_Q // BLOCK), 0), num_blocks) > 0
    queries_I = np.bincount(np.arange(len(first_Q)) // BLOCK)
    whole_IJ = _count(-(-first_Q // BLOCK), np.where(sees_Q, stop_Q, 0), num_blocks)
    full_IJ = whole_IJ == queries_I[:, None]
    partial_IJ = seen_IJ & ~full_IJ
    return Blocks(
        *_listed(partial_IJ), *_listed(full_IJ), *_listed(partial_IJ.T), *_listed(full_IJ.T)
    )


def _count(
    begin_Q: NDArray[np.int64], end_Q: NDArray[np.int64], num_blocks: int
) -> NDArray[np.int64]:
    """Counts by block how many of its queries hold each block of keys in [begin, end)."""
    block_Q = np.arange(len(begin_Q)) // BLOCK
    held = end_Q > begin_Q
    shape = (int(block_Q[-1]) + 1, num_blocks + 1)
    changes_IJ = np.zeros(shape, dtype=np.int64)
    np.add.at(changes_IJ, (block_Q[held], begin_Q[held]), 1)
    np.add.at(changes_IJ, (block_Q[held], end_Q[held]), -1)
    return changes_IJ.cumsum(axis=1)[:, :num_blocks]


def _listed(mask_IJ: NDArray[np.bool_]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    counts = mask_IJ.sum(axis=1, dtype=np.int32)
    order = np.argsort(~mask_IJ, axis=1, kind="stable").astype(np.int32)
    return counts[None, None], order[None, None]
