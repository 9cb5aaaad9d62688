"""Blocks of a pack's masks against the dense matrix of who sees what."""

from __future__ import annotations

import random

import numpy as np
import pytest
from numpy.typing import NDArray

from nvlm_train.device_batch import Span
from nvlm_train.model.attention import intervals
from nvlm_train.model.attention.intervals import BLOCK, Intervals


def dense(each: Intervals) -> NDArray[np.bool_]:
    keys_K = np.arange(each.num_keys)
    return (keys_K >= each.first_Q[:, None]) & (keys_K < each.last_Q[:, None])


def listed(counts: NDArray[np.int32], indices: NDArray[np.int32]) -> list[set[int]]:
    rows = zip(counts[0, 0].tolist(), indices[0, 0].tolist(), strict=True)
    return [set(row[:count]) for count, row in rows]


def random_spans(draw: random.Random, tokens: int, context: int) -> tuple[Span, ...]:
    edges = sorted(draw.sample(range(tokens + 1), 2 * draw.randint(1, 5)))
    parts = [sorted(draw.sample(range(context + 1), 2)) for _ in edges[::2]]
    pairs = zip(edges[::2], edges[1::2], strict=True)
    return tuple(Span(*rows, *part) for rows, part in zip(pairs, parts, strict=True))


def cases() -> list[Intervals]:
    draw, found = random.Random(0), []
    for _ in range(40):
        lengths = [draw.choice([1, 5, 127, 128, 129, 300]) for _ in range(draw.randint(1, 5))]
        own = intervals.of_segments(lengths)
        total, context = sum(lengths), draw.choice([1, 100, 128, 256, 700])
        wanted = sorted(draw.sample(range(total), draw.randint(1, total)))
        spans = random_spans(draw, total, context) if total > 10 and context > 10 else ()
        crossing = intervals.of_spans(spans, total, context)
        found += [own, own.of_rows(wanted), crossing, crossing.of_rows(wanted)]
    return found


def test_tokens_see_their_segment_up_to_themselves() -> None:
    found = dense(intervals.of_segments([2, 3]))
    expected = np.tril(np.ones((5, 5), dtype=bool))
    expected[2:, :2] = False
    assert np.array_equal(found, expected)


def test_spans_say_who_sees_the_context() -> None:
    found = intervals.of_spans((Span(1, 3, 0, 2), Span(3, 4, 1, 5)), num_queries=5, num_keys=5)
    assert dense(found).astype(int).tolist() == [
        [0, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0],
    ]  # fmt: skip
    assert found.sees_Q.tolist() == [0, 1, 1, 1, 0]


@pytest.mark.parametrize("number", range(0, 160, 4))
def test_blocks_are_those_of_the_dense_matrix(number: int) -> None:
    for each in cases()[number : number + 4]:
        matrix, found = dense(each), intervals.blocks_of(each)
        partial, full = (
            {
                (i, j)
                for i in range(-(-matrix.shape[0] // BLOCK))
                for j in range(-(-matrix.shape[1] // BLOCK))
                if kind(matrix[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK])
            }
            for kind in (lambda part: part.any() and not part.all(), np.all)
        )
        for expected, names in ((partial, ""), (full, "full_")):
            for side, pairs in (("kv", expected), ("q", {(j, i) for i, j in expected})):
                rows = listed(
                    getattr(found, f"{names}{side}_num_blocks"),
                    getattr(found, f"{names}{side}_indices"),
                )
                assert {(a, b) for a, row in enumerate(rows) for b in row} == pairs
