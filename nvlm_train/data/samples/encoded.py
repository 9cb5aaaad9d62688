"""A sample as the model reads it: token ids, image slots, labels, and what goes through
cross-attention.

Shape legend: N tokens of the sample, L trained positions, T tiles of all its images.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from nvlm_train.tiling import Grid, ImageLayout


@dataclass(frozen=True, slots=True)
class CrossTiles:
    """The part of a sample that goes through cross-attention; it is empty in NVLM-D.

    Shape legend: C cross-routed tiles, numbered through all images; P spans.
    """

    tokens_per_tile: int
    is_cross_T: NDArray[np.bool_]
    """[T]: which of the sample's tiles."""
    tags: tuple[NDArray[np.int64], ...]
    """C times the ids of the tag before a tile's features in the context; none in NVLM-X."""
    spans: NDArray[np.int64]
    """[P, 4]: tokens [start, stop) see the tiles [first, last); ascending. Other tokens see none."""


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """One sample as the model reads it."""

    token_ids: NDArray[np.int64]
    """[N]; image slots hold the pad id."""
    image_positions: NDArray[np.int64]
    """[decoder-routed tiles * tokens per tile]: the slots, in tile order."""
    label_positions: NDArray[np.int64]
    """[L]: positions whose next token is trained; ascending."""
    label_ids: NDArray[np.int64]
    """[L]: the token to predict at each of them."""
    images: tuple[ImageLayout, ...]
    cross: CrossTiles
    is_truncated: bool

    @property
    def grids(self) -> tuple[Grid, ...]:
        """(columns, rows) of each image."""
        return tuple(image.grid for image in self.images)

    @property
    def tiles_per_image(self) -> tuple[int, ...]:
        """Tiles of each image, thumbnail included."""
        return tuple(image.num_tiles for image in self.images)

    @property
    def num_tiles(self) -> int:
        return sum(self.tiles_per_image)

    def with_room(self, num_tokens: int) -> EncodedSample:
        """Returns the sample with empty tokens behind it, which see what its last token sees."""
        length = len(self.token_ids)
        spans = self.cross.spans.copy()
        if len(spans) and spans[-1, 1] == length:
            spans[-1, 1] += num_tokens
        return replace(
            self,
            token_ids=np.append(self.token_ids, np.zeros(num_tokens, dtype=np.int64)),
            cross=replace(self.cross, spans=spans),
        )

    def truncated(self, length: int) -> EncodedSample:
        """Cuts the sample's end off after `length` tokens.

        Image slots are never cut: the features of a tile come whole.

        Raises:
            ValueError: images reach behind `length`.
        """
        if len(self.token_ids) <= length:
            return self
        if len(self.image_positions) and self.image_positions[-1] >= length:
            raise ValueError(
                f"images do not fit: with one tile each, {len(self.grids)} images reach "
                f"position {self.image_positions[-1]}, behind sequence_length={length}"
            )
        kept = int(np.searchsorted(self.label_positions, length - 1))
        spans = self.cross.spans[self.cross.spans[:, 0] < length].copy()
        spans[:, 1] = np.minimum(spans[:, 1], length)
        return replace(
            self,
            token_ids=self.token_ids[:length],
            label_positions=self.label_positions[:kept],
            label_ids=self.label_ids[:kept],
            cross=replace(self.cross, spans=spans),
            is_truncated=True,
        )
