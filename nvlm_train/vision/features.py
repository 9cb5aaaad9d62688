"""What encoders of every kind share: pixels normalised on the way in, patches joined on the way out.

Shape legend: T tiles, C channels, E tile edge, P patches of a tile, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nvlm_train.geometry import PIXEL_SHUFFLE

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


Colours = tuple[float, float, float]
"""A number each for red, green and blue, of pixels in 0..1."""


def normalised(tiles_TCEE: Tensor, mean: Colours, std: Colours) -> Tensor:
    """Takes a mean out of pixels and divides them by a standard deviation, in fp32.

    The two are no buffers: a cast of the module to bf16 would round them, 0.225 by 0.2 percent.

    Args:
        tiles_TCEE: uint8 [T, 3, E, E], RGB.
        mean: of each colour.
        std: of each colour.

    Returns:
        fp32 [T, 3, E, E], on the tiles' device.
    """
    mean_C11, std_C11 = (
        torch.tensor(values, dtype=torch.float32, device=tiles_TCEE.device).view(3, 1, 1)
        for values in (mean, std)
    )
    return (tiles_TCEE.float() / 255 - mean_C11) / std_C11


def imagenet_normalised(tiles_TCEE: Tensor) -> Tensor:
    """Normalises pixels by ImageNet's mean and standard deviation, as InternViT was trained."""
    return normalised(tiles_TCEE, IMAGENET_MEAN, IMAGENET_STD)


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
