"""D, X and H as one table: which way the thumbnail and the regular tiles take into the language model.

`decoder`: the tile's features stand in the decoder's sequence, in the place of slots.
`cross`: they are keys and values of the gated cross-attention layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nvlm_train.config.model_schema import Architecture

Route = Literal["decoder", "cross"]


@dataclass(frozen=True)
class Routes:
    """One row of the table."""

    thumbnail: Route
    """Of the thumbnail; an image of one tile is its own thumbnail."""
    tile: Route
    """Of regular tiles."""
    tag: Route
    """Where the tag of a cross-routed tile stands: in the decoder's text, or before its tile's features."""

    def of_image(self, num_tiles: int) -> list[Route]:
        """Route of each tile of an image, thumbnail last."""
        return [self.tile] * (num_tiles - 1) + [self.thumbnail]


ROUTES: dict[Architecture, Routes] = {
    "d": Routes(thumbnail="decoder", tile="decoder", tag="decoder"),
    "x": Routes(thumbnail="cross", tile="cross", tag="decoder"),
    "h": Routes(thumbnail="decoder", tile="cross", tag="cross"),
}
"""NVLM 1.0, sections 4.2, 4.3 and 4.4."""
