"""Every data-parallel rank saves and reads a share of its own, which any layout finds again."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nvlm_train.config.schema import ParallelConfig
from nvlm_train.train.checkpoint.rectangles import rectangles
from tests.train.checkpoint import share_runs
from tests.train.checkpoint.share_runs import Found, Kind
from tests.workers import WorkerPool

slow = pytest.mark.slow
LAYOUTS = {
    "single": (1, ParallelConfig()),
    "DP2": (2, ParallelConfig()),
    "DP4": (4, ParallelConfig()),
    "TP2": (2, ParallelConfig(tensor=2)),
    "TP2 SP DP2": (4, ParallelConfig(tensor=2, sequence_parallel=True)),
    "PP2 DP2": (4, ParallelConfig(pipeline=2)),
    "TP2 PP2": (4, ParallelConfig(tensor=2, pipeline=2)),
}
X = Kind("x")
FROZEN = Kind("x", ("projector", "cross_attention"))
HALF = Kind(precision="bf16")


# ---- rectangles ----


@given(
    rows=st.integers(1, 9),
    width=st.integers(1, 7),
    ends=st.tuples(st.integers(0, 63), st.integers(0, 63)),
    most=st.integers(1, 40),
)
def test_rectangles_are_the_range(rows: int, width: int, ends: tuple[int, int], most: int) -> None:
    matrix = torch.arange(rows * width).view(rows, width)
    start, stop = sorted(min(each, rows * width) for each in ends)
    found = list(rectangles((rows, width), start, stop, most))
    parts = [
        matrix[row : row + height, column : column + length].flatten().tolist()
        for (row, column), (height, length), _ in found
    ]
    assert sum(parts, []) == list(range(start, stop))
    assert all(part[0] == each.start for part, each in zip(parts, found, strict=True))
    assert all(one.stop == other.start for one, other in pairwise(found))
    assert all(each.size[0] == 1 or each.size[0] * each.size[1] <= most for each in found)
    assert len(list(rectangles((rows, width), start, stop, rows * width))) <= 3


@given(st.tuples(st.integers(0, 20), st.integers(0, 20)), st.integers(1, 9))
def test_ranges_of_vectors(ends: tuple[int, int], most: int) -> None:
    start, stop = sorted(ends)
    found = list(rectangles((20,), start, stop, most))
    numbers = [n for each in found for n in range(each.offset[0], each.offset[0] + each.size[0])]
    assert numbers == list(range(start, stop))
    assert all(each.size[0] <= most for each in found)


# ---- what a rank does ----


@pytest.mark.parametrize(
    "layout",
    ["DP2", "DP4", *(pytest.param(each, marks=slow) for each in ("TP2 SP DP2", "PP2 DP2"))],
)
def test_shares_shrink_with_data_parallelism(
    workers: WorkerPool, tmp_path: Path, layout: str
) -> None:
    single = workers.run(1, share_runs.save_and_load, ParallelConfig(), tmp_path / "single")
    world, parallel = LAYOUTS[layout]
    ranks = workers.run(world, share_runs.save_and_load, parallel, tmp_path / "several")
    (whole,) = single
    assert sum(each.own_bytes for each in ranks) == whole.own_bytes
    # Of a file, each tensor has a head of its own.
    assert ranks[0].all_written - _heads(ranks) == pytest.approx(
        whole.all_written - _heads(single), rel=0.1
    )
    for each in ranks:
        assert each.own_bytes <= 1.15 * whole.own_bytes / world
    for each in (*single, *ranks):
        assert each.written >= each.own_bytes
        # Nothing is gathered, and later saves do not exchange plans either.
        assert each.exchanged == [0, 0, 0]
        assert each.plans[0] > 0 and each.plans[2] == 0
        assert each.copies == {"aten.clone.default": 0, "aten.copy_.default": each.pieces}
        assert each.read <= 1.2 * each.all_written / (1 if each is whole else world)
    # Norms are held by all tensor-parallel ranks, and written by one of them.
    assert sum(each.read for each in ranks) <= 1.1 * ranks[0].all_written


def _heads(ranks: list[Found]) -> int:
    """Bytes of the files that are no numbers."""
    return ranks[0].all_written - sum(each.own_bytes for each in ranks)


# ---- any layout ----


def assert_right_after_load(workers: WorkerPool, kind: Kind, into: str, directory: Path) -> None:
    """Checks every number of weights and moments on all ranks of a layout."""
    world, parallel = LAYOUTS[into]
    wrong = workers.run(world, share_runs.wrong_after_load, kind, parallel, directory)
    assert wrong == [[]] * world


@pytest.mark.parametrize(
    ("kind", "saved", "into"),
    [
        (X, "TP2 SP DP2", "PP2 DP2"),
        (HALF, "DP4", "TP2"),
        *(
            pytest.param(kind, saved, into, marks=slow)
            for kind, saved, into in (
                (Kind(), "PP2 DP2", "DP4"),
                (Kind(), "TP2 PP2", "DP4"),
                (Kind(), "DP4", "DP2"),
                (Kind(), "DP2", "DP4"),
                (HALF, "TP2 SP DP2", "single"),
                (X, "DP4", "TP2 PP2"),
                (Kind("h"), "PP2 DP2", "TP2 SP DP2"),
                (Kind("x with feed-forward"), "DP2", "TP2"),
                (FROZEN, "DP4", "TP2 SP DP2"),
                (FROZEN, "TP2 SP DP2", "PP2 DP2"),
                (Kind("d", ("projector",)), "PP2 DP2", "single"),
            )
        ),
    ],
)
def test_any_layout_finds_every_number(
    workers: WorkerPool, tmp_path: Path, kind: Kind, saved: str, into: str
) -> None:
    directory = tmp_path / "saved"
    workers.run(LAYOUTS[saved][0], share_runs.save, kind, LAYOUTS[saved][1], directory)
    assert_right_after_load(workers, kind, into, directory)


@pytest.mark.parametrize(
    ("kind", "saved", "into"),
    [(HALF, "DP2", "TP2"), *(pytest.param(X, "TP2 PP2", each, marks=slow) for each in LAYOUTS)],
)
def test_what_was_saved_before_is_read(
    workers: WorkerPool, tmp_path: Path, kind: Kind, saved: str, into: str
) -> None:
    """In other pieces, under the same names."""
    directory = tmp_path / "saved"
    workers.run(LAYOUTS[saved][0], share_runs.save_as_before, kind, LAYOUTS[saved][1], directory)
    assert_right_after_load(workers, kind, into, directory)


def test_weights_that_are_not_spread_are_caught(workers: WorkerPool, tmp_path: Path) -> None:
    """Deliberate bug: data-parallel ranks keep the weights of which another read its share."""
    directory = tmp_path / "saved"
    workers.run(2, share_runs.save, Kind(), ParallelConfig(), directory)
    found = workers.run(2, share_runs.wrong_without_spreading, Kind(), ParallelConfig(), directory)
    assert all(found)
