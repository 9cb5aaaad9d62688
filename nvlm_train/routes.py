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
    """Of the thumbnail; in a stage with thumbnails an image of one tile is its own."""
    tile: Route
    """Of regular tiles."""
    tag: Route
    """Where the tag of a cross-routed tile stands: in the decoder's text, or before its tile's features."""

    def of_image(self, num_regular: int, num_thumbnails: int) -> list[Route]:
        """Lists the route of each tile of an image: regular ones, then the thumbnail where there is one.

        >>> ROUTES["h"].of_image(2, 1), ROUTES["h"].of_image(0, 1), ROUTES["x"].of_image(2, 0)
        (['cross', 'cross', 'decoder'], ['decoder'], ['cross', 'cross'])
        """
        return [self.tile] * num_regular + [self.thumbnail] * num_thumbnails


ROUTES: dict[Architecture, Routes] = {
    "d": Routes(thumbnail="decoder", tile="decoder", tag="decoder"),
    "x": Routes(thumbnail="cross", tile="cross", tag="decoder"),
    "h": Routes(thumbnail="decoder", tile="cross", tag="cross"),
}
"""NVLM 1.0, sections 4.2, 4.3 and 4.4."""
