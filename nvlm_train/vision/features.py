"""What encoders of every kind share: pixels normalised on the way in, patches joined on the way out.

Shape legend: T tiles, C channels, E tile edge, P patches of a tile, H hidden.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from nvlm_train.geometry import PIXEL_SHUFFLE

Colours = tuple[float, float, float]
"""A number each for red, green and blue, of pixels in 0..1."""


class Distribution(NamedTuple):
    """Mean and standard deviation of the pixels that an encoder was trained on."""

    mean: Colours
    std: Colours

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns both as fp32 [3, 1, 1] on a device, where they are made once.

        They are no buffers of the encoder: a cast of the module to bf16 would round them, 0.225 by 0.2
        percent.
        """
        return _on_device(self.mean, device), _on_device(self.std, device)


@cache
def _on_device(values: Colours, device: torch.device) -> Tensor:
    # A tensor that is made under inference mode could not be used outside of it later.
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1)


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGENET = Distribution(IMAGENET_MEAN, IMAGENET_STD)
"""How InternViT's pixels are normalised."""


def normalised(tiles_TCEE: Tensor, mean_C11: Tensor, std_C11: Tensor) -> Tensor:
    """Takes a mean out of pixels and divides them by a standard deviation, in fp32.

    Args:
        tiles_TCEE: uint8 [T, 3, E, E], RGB.
        mean_C11: of each colour, fp32.
        std_C11: of each colour, fp32.

    Returns:
        fp32 [T, 3, E, E].
    """
    return (tiles_TCEE / 255 - mean_C11) / std_C11


def imagenet_normalised(tiles_TCEE: Tensor) -> Tensor:
    """Normalises pixels, uint8 [T, 3, E, E], by ImageNet's mean and standard deviation: fp32."""
    return normalised(tiles_TCEE, *IMAGENET.on(tiles_TCEE.device))


def pixel_shuffle(x_TPH: Tensor) -> Tensor:
    """Joins 2 x 2 neighbouring patches into one token ("version 2" of the released code).

    Args:
        x_TPH: [T, side * side, H] in raster order.

    Returns:
        [T, side * side / 4, 4 H] in raster order; token (r, c) has the channels of the patches
        (2r, 2c), (2r, 2c+1), (2r+1, 2c), (2r+1, 2c+1), in this order.
    """
    num_tiles, num_patches, hidden = x_TPH.shape
    factor, side = PIXEL_SHUFFLE, round(num_patches**0.5)
    blocks = x_TPH.view(num_tiles, side // factor, factor, side // factor, factor, hidden)
    return blocks.transpose(2, 3).reshape(num_tiles, -1, factor * factor * hidden)
