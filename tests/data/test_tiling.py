"""Grids against a literal copy of the original's loop, over every order of its set."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvlm_train.tiling import (
    Grid,
    candidate_grids,
    choose_grid,
    lay_out,
    num_tiles,
    tile_limits,
)


def reference(width: int, height: int, tile: int, grids: list[Grid]) -> Grid:
    """InternVL's find_closest_aspect_ratio."""
    best_diff, best = float("inf"), (1, 1)
    for ratio in grids:
        diff = abs(width / height - ratio[0] / ratio[1])
        if diff < best_diff:
            best_diff, best = diff, ratio
        elif diff == best_diff and width * height > 0.5 * tile * tile * ratio[0] * ratio[1]:
            best = ratio
    return best


def original_set(max_tiles: int) -> set[Grid]:
    sides = range(1, max_tiles + 1)
    return {(i, j) for i, j in itertools.product(sides, sides) if i * j <= max_tiles}


def test_fourteen_grids_for_six_tiles() -> None:
    assert len(candidate_grids(6)) == 14
    assert set(candidate_grids(6)) == original_set(6)
    areas = [columns * rows for columns, rows in candidate_grids(12)]
    assert areas == sorted(areas)


@settings(max_examples=400, deadline=None)
@given(st.integers(1, 4000), st.integers(1, 4000), st.sampled_from([32, 448]), st.integers(1, 12))
def test_matches_the_original_whatever_order_its_set_has(
    width: int, height: int, tile: int, max_tiles: int
) -> None:
    ours = choose_grid(width, height, tile, max_tiles)
    forward = sorted(original_set(max_tiles), key=lambda g: g[0] * g[1])
    backward = sorted(sorted(original_set(max_tiles), reverse=True), key=lambda g: g[0] * g[1])
    assert ours == reference(width, height, tile, forward)
    assert ours == reference(width, height, tile, backward)


def test_equal_areas_never_tie_at_the_best_distance() -> None:
    grids = candidate_grids(12)
    for one, other in itertools.combinations(grids, 2):
        if one[0] * one[1] != other[0] * other[1]:
            continue
        middle = (one[0] / one[1] + other[0] / other[1]) / 2
        reach = abs(one[0] / one[1] - middle)
        assert any(abs(grid[0] / grid[1] - middle) < reach for grid in grids), (one, other)


@pytest.mark.parametrize(
    ("size", "grid"),
    [((448, 448), (1, 1)), ((635, 635), (2, 2)), ((633, 633), (1, 1)), ((3000, 200), (6, 1))],
)
def test_known_grids(size: tuple[int, int], grid: Grid) -> None:
    assert choose_grid(*size, 448, 6) == grid


def test_thumbnail_only_beside_several_tiles() -> None:
    assert [num_tiles(grid, 1) for grid in ((1, 1), (1, 2), (3, 2))] == [1, 3, 7]
    assert [num_tiles(grid, 0) for grid in ((1, 1), (1, 2), (3, 2))] == [1, 2, 6]
    assert (lay_out((1, 1), 1).num_regular, lay_out((1, 1), 0).num_regular) == (0, 1)
    assert tile_limits(12) == (12, 8, 6, 4, 2, 1)
    assert tile_limits(3) == (3, 2, 1)
