"""Image bytes to uint8 tiles. Shape legend: H, W image size; T tiles; E tile edge in pixels; C = 3.

Headers are read with Pillow, JPEG pixels are decoded with libjpeg-turbo (simplejpeg) and resized by
torch's antialiased uint8 kernel, which follows the bicubic filter of Pillow 10 to 12 to within
rounding; Pillow 13 makes its two passes in another order where that is cheaper (docs/data/encoding.md).
Every function raises ValueError, with the reason, for bytes that are not an intact image.
"""

from __future__ import annotations

import io
import struct
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

if TYPE_CHECKING:
    from torch import Tensor

    from nvlm_train.tiling import Grid

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

FORMATS = tuple(
    plugin.format
    for plugin in (
        JpegImagePlugin.JpegImageFile,
        PngImagePlugin.PngImageFile,
        WebPImagePlugin.WebPImageFile,
        GifImagePlugin.GifImageFile,
        BmpImagePlugin.BmpImageFile,
        TiffImagePlugin.TiffImageFile,
    )
)
"""The decoders that data can reach; Pillow has others that start external programs."""

_ORIENTATION_TAG = 0x0112
_TURNED = range(5, 9)
"""EXIF orientations that swap width and height."""
_DEEP_GREY_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")
_PIXEL_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    KeyError,
    IndexError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""The errors that Pillow's readers raise on damaged files."""


def read_size(data: bytes) -> tuple[int, int]:
    """Reads (width, height) after EXIF rotation from the header alone; no pixel is decoded."""
    image = _open(data)
    width, height = image.size
    return (height, width) if _orientation(image) in _TURNED else (width, height)


def decode_image(data: bytes, max_pixels: int) -> Tensor:
    """Decodes an image to upright RGB pixels: uint8 [C, H, W] (a view of [H, W, C] memory).

    Animations give their first frame, alpha is laid on white, 16-bit grey gives its upper 8 bits.

    Raises:
        ValueError: damaged or truncated data, an unknown format, or more than `max_pixels`.
    """
    import torch

    image = _open(data)
    check_pixels(*image.size, max_pixels)
    orientation = _orientation(image)
    try:
        if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
            pixels_HWC = _decode_jpeg(data)
        else:
            pixels_HWC = _decode_other(image)
    except _PIXEL_ERRORS as error:
        raise ValueError(f"image cannot be read: {_reason(error)}") from error
    # torch wants memory that it may write and strides that are not negative.
    upright_HWC = np.require(_turn_upright(pixels_HWC, orientation), requirements=["C", "W"])
    return torch.from_numpy(upright_HWC).permute(2, 0, 1)


def cut_tiles(image_CHW: Tensor, grid: Grid, num_tiles: int, tile_size: int) -> Tensor:
    """Resizes the image to the grid, whatever its shape, and cuts it row by row: uint8 [T, C, E, E].

    When `num_tiles` is one more than the grid's tiles, the thumbnail, made from the whole image,
    comes last (NVLM 1.0, section 4.1).
    """
    import torch

    tiles_TCEE = np.empty((num_tiles, 3, tile_size, tile_size), dtype=np.uint8)
    cut_tiles_into(tiles_TCEE, image_CHW, grid)
    return torch.from_numpy(tiles_TCEE)


def cut_tiles_into(tiles_TCEE: Pixels, image_CHW: Tensor, grid: Grid) -> None:
    """Does the same as `cut_tiles` into memory that is there already: contiguous uint8 [T, C, E, E]."""
    columns, rows = grid
    edge = tiles_TCEE.shape[-1]
    whole_CHW = _resize(image_CHW, rows * edge, columns * edge).numpy()
    # numpy moves the pixels, once: torch would start its thread team in every background thread.
    regular = tiles_TCEE[: rows * columns].reshape(rows, columns, 3, edge, edge)
    regular[:] = whole_CHW.reshape(3, rows, edge, columns, edge).transpose(1, 3, 0, 2, 4)
    if len(tiles_TCEE) > rows * columns:
        tiles_TCEE[-1] = _resize(image_CHW, edge, edge).numpy()


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    """Refuses a decompression bomb before anything is decoded.

    Raises:
        ValueError: more than `max_pixels` pixels.
    """
    if width * height > max_pixels:
        raise ValueError(
            f"image is too large: width={width} x height={height} is more than "
            f"loader.max_image_pixels={max_pixels}; shrink the image or raise the limit"
        )


def _open(data: bytes) -> Image.Image:
    """Opens the image: its header is read and its pixels are not."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except _PIXEL_ERRORS as error:
        raise ValueError(f"image cannot be read: {_reason(error)}") from error
    if min(image.size) < 1:
        raise ValueError(f"image cannot be read: its size is {image.size[0]} x {image.size[1]}")
    return image


def _reason(error: BaseException) -> str:
    """Returns one line of the decoder's complaint, without the address of the buffer it read from."""
    text = str(error).strip().split("\n")[0]
    if text.startswith("cannot identify image file"):
        return "not a JPEG, PNG, WebP, GIF, BMP or TIFF file, or its header is damaged"
    return text or type(error).__name__


def _orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation, 1 to 8."""
    # A PNG may carry EXIF behind its pixels, and Pillow would decode them to look for it.
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except _PIXEL_ERRORS:
        # Damaged metadata around an intact image: it is shown as it is stored.
        return 1
    return value if isinstance(value, int) and value in range(1, 9) else 1


def _decode_jpeg(data: bytes) -> Pixels:
    """Decodes to uint8 [H, W, C]; `strict` makes libjpeg's warnings, truncation among them, errors."""
    import simplejpeg

    pixels: Pixels = simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
    return pixels


def _decode_other(image: Image.Image) -> Pixels:
    """Decodes anything that Pillow reads to uint8 [H, W, C]."""
    image.load()
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range; convert the image to 8 bits")
    if image.mode in _DEEP_GREY_MODES:
        grey_HW = np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8
        return np.repeat(grey_HW.astype(np.uint8)[:, :, None], 3, axis=2)
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return np.asarray(Image.alpha_composite(white, rgba).convert("RGB"))
    return np.asarray(image.convert("RGB"))


def _turn_upright(pixels_HWC: Pixels, orientation: int) -> Pixels:
    """Undoes the camera's rotation and mirroring (EXIF 2.3, tag 0x0112)."""
    if orientation in (5, 6, 7, 8):
        pixels_HWC = pixels_HWC.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels_HWC = pixels_HWC[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels_HWC = pixels_HWC[::-1]
    return pixels_HWC


def _resize(image_CHW: Tensor, height: int, width: int) -> Tensor:
    """Resizes with an antialiased bicubic filter; an image of that size already is left as it is."""
    from torch.nn.functional import interpolate

    if tuple(image_CHW.shape[1:]) == (height, width):
        return image_CHW
    return interpolate(image_CHW[None], size=(height, width), mode="bicubic", antialias=True)[0]
