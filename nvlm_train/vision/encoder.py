"""What a vision encoder is to everything above it, and the table of kinds that a recipe may name.

Another encoder is one file with a module of this shape, one row here, and one row in
`nvlm_train/convert/vision.py` that lists its tensors (docs/extending.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from nvlm_train.config.model_schema import VisionConfig
from nvlm_train.vision.intern_vit import InternViT
from nvlm_train.vision.intern_vit_300m import InternViT300M
from nvlm_train.vision.siglip import Siglip


class VisionEncoder(Protocol):
    """A frozen encoder: uint8 tiles in, features for the projector out.

    It holds no state between calls and works on each tile by itself, so any rank may encode any tile.
    """

    config: VisionConfig

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its weights and of the features."""
        ...

    @property
    def device(self) -> torch.device:
        """Where its weights lie."""
        ...

    def __call__(self, tiles_TCEE: Tensor) -> Tensor:
        """Encodes tiles.

        Args:
            tiles_TCEE: uint8 [T, 3, E, E], RGB, on the encoder's device.

        Returns:
            [T, tokens per tile, `geometry.tile_feature_size`] of the encoder's dtype, in raster order.
        """
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields the weights by name, as torch.nn.Module does."""
        ...


KINDS: Mapping[str, Callable[[VisionConfig], VisionEncoder]] = {
    "intern_vit_6b": InternViT,
    "intern_vit_300m": InternViT300M,
    "siglip": Siglip,
}
"""`model.vision.kind` to the module that computes it. `convert.vision.KINDS` has the same keys."""
