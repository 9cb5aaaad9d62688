"""Dynamic high resolution: which grid of tiles an image is cut into (NVLM 1.0, section 4.1).

The arithmetic is InternVL's `dynamic_preprocess`, floating-point comparisons included, so that a
model trained here sees at inference elsewhere the grids it was trained on.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

TILE_LADDER = (12, 8, 6, 4, 2, 1)
"""Tile limits tried in turn while a sample does not fit (Megatron-LM, examples/multimodal)."""

Grid = tuple[int, int]
"""(columns, rows) that an image is cut into."""


class ImageLayout(NamedTuple):
    """It says which tiles an image has: regular ones, row by row, then the thumbnail where there is one."""

    grid: Grid
    num_regular: int
    """Tiles of the grid that are called parts; 0 where the only tile is its own thumbnail."""
    num_thumbnails: int
    """0 or 1."""

    @property
    def num_tiles(self) -> int:
        """It counts the thumbnail, too."""
        return self.num_regular + self.num_thumbnails


@lru_cache(maxsize=16)
def candidate_grids(max_tiles: int) -> tuple[Grid, ...]:
    """Lists every (columns, rows) with columns * rows <= max_tiles, smallest area first.

    The original sorts a Python set by area and so leaves the order inside one area to the
    interpreter; here it is by columns. It decides nothing: two grids of equal area are never both
    the closest to an aspect ratio (tests/data/test_tiling.py tries all orders).

    >>> len(candidate_grids(6))
    14
    >>> candidate_grids(2)
    ((1, 1), (1, 2), (2, 1))
    """
    grids = [
        (columns, rows)
        for columns in range(1, max_tiles + 1)
        for rows in range(1, max_tiles // columns + 1)
    ]
    return tuple(sorted(grids, key=lambda grid: (grid[0] * grid[1], grid)))


@lru_cache(maxsize=65536)
def choose_grid(width: int, height: int, tile_size: int, max_tiles: int) -> Grid:
    """Chooses the grid whose aspect ratio is closest to the image's, as (columns, rows).

    A later grid at the same distance (2 x 2 after 1 x 1) wins only when the image has more than
    half of that grid's pixels.

    >>> choose_grid(800, 600, 448, 6)
    (3, 2)
    >>> choose_grid(100, 100, 448, 6), choose_grid(1000, 1000, 448, 6)
    ((1, 1), (2, 2))
    """
    aspect_ratio = width / height
    best: Grid = (1, 1)
    best_distance = float("inf")
    for columns, rows in candidate_grids(max_tiles):
        distance = abs(aspect_ratio - columns / rows)
        large_enough = width * height > 0.5 * tile_size * tile_size * columns * rows
        if distance < best_distance or (distance == best_distance and large_enough):
            best, best_distance = (columns, rows), distance
    return best


def lay_out(grid: Grid, num_thumbnails: int) -> ImageLayout:
    """Lays out the tiles of an image under a stage's `tiling.thumbnail` (0 or 1 thumbnails asked for).

    With thumbnails a one-tile image is not encoded twice: the tile, which is the whole image, is
    the thumbnail (released NVLM-D: `tags[:n - 1] + [thumbnail]`). Without them no tile is one, the
    only tile of an image included: it is tile 1 of 1.

    >>> tuple(lay_out((3, 2), 1)), tuple(lay_out((1, 1), 1))
    (((3, 2), 6, 1), ((1, 1), 0, 1))
    >>> tuple(lay_out((3, 2), 0)), tuple(lay_out((1, 1), 0))
    (((3, 2), 6, 0), ((1, 1), 1, 0))
    """
    regular = grid[0] * grid[1]
    return ImageLayout(grid, 0 if regular == num_thumbnails == 1 else regular, num_thumbnails)


def num_tiles(grid: Grid, num_thumbnails: int) -> int:
    """Counts the tiles of an image: the grid's, and the thumbnail (0 or 1 asked for) when there are several.

    >>> num_tiles((3, 2), 1), num_tiles((1, 1), 1), num_tiles((3, 2), 0)
    (7, 1, 6)
    """
    return lay_out(grid, num_thumbnails).num_tiles


def tile_limits(max_tiles: int) -> tuple[int, ...]:
    """Lists `max_tiles`, then the smaller limits to try when a sample does not fit.

    >>> tile_limits(6), tile_limits(5), tile_limits(1)
    ((6, 4, 2, 1), (5, 4, 2, 1), (1,))
    """
    return (max_tiles, *(limit for limit in TILE_LADDER if limit < max_tiles))
