"""Every format and mode through decoding and tiling, against Pillow: 2 levels at most."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from nvlm_train.data.images import cut_tiles, decode_image, read_size
from nvlm_train.tiling import choose_grid, num_tiles
from tests.data.conftest import encoded, resized

EDGE = 56
Make = Callable[[], bytes]


def scene(width: int = 331, height: int = 207) -> Image.Image:
    """Colours that run, an edge, and fine grain: what a wrong filter, order or range would show."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    grain = np.random.default_rng(3).normal(0, 12, (height, width))
    channels = [255 * x, 255 * y, 255 * (1 - x) * y + 60 * (x > 0.5)]
    return Image.fromarray(
        np.clip(np.stack([c + grain for c in channels], axis=2), 0, 255).astype(np.uint8)
    )


def grey16(image_format: str) -> bytes:
    light = np.asarray(scene().convert("L")).astype(np.uint16)
    return encoded(Image.fromarray(light * 256 + 77), image_format)


def translucent() -> Image.Image:
    image = scene().convert("RGBA")
    image.putalpha(scene().convert("L").rotate(180))
    return image


def turned(image_format: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(scene(), image_format, exif=exif, quality=92)


def frames(image_format: str) -> bytes:
    others = [scene().transpose(Image.Transpose.FLIP_TOP_BOTTOM)]
    return encoded(scene(), image_format, save_all=True, append_images=others, lossless=True)


CASES: dict[str, Make] = {
    "jpeg": lambda: encoded(scene(), "JPEG", quality=92),
    "jpeg 4:4:4": lambda: encoded(scene(), "JPEG", quality=92, subsampling=0),
    "jpeg progressive": lambda: encoded(scene(), "JPEG", quality=92, progressive=True),
    "jpeg grey": lambda: encoded(scene().convert("L"), "JPEG", quality=92),
    "jpeg cmyk": lambda: encoded(scene().convert("CMYK"), "JPEG", quality=92),
    "jpeg turned": lambda: turned("JPEG", 6),
    "jpeg mirrored": lambda: turned("JPEG", 5),
    "png": lambda: encoded(scene(), "PNG"),
    "png grey": lambda: encoded(scene().convert("L"), "PNG"),
    "png black and white": lambda: encoded(scene().convert("1"), "PNG"),
    "png palette": lambda: encoded(scene().quantize(64), "PNG"),
    "png palette with transparency": lambda: encoded(scene().quantize(64), "PNG", transparency=5),
    "png alpha": lambda: encoded(translucent(), "PNG"),
    "png grey alpha": lambda: encoded(translucent().convert("LA"), "PNG"),
    "png 16 bits": lambda: grey16("PNG"),
    "png turned": lambda: turned("PNG", 8),
    "webp": lambda: encoded(scene(), "WEBP", quality=90),
    "webp lossless alpha": lambda: encoded(translucent(), "WEBP", lossless=True, exact=True),
    "webp animation": lambda: frames("WEBP"),
    "webp turned": lambda: turned("WEBP", 3),
    "gif": lambda: encoded(scene(), "GIF"),
    "gif animation": lambda: frames("GIF"),
    "gif transparent": lambda: encoded(scene().quantize(64), "GIF", transparency=5),
    "bmp": lambda: encoded(scene(), "BMP"),
    "tiff": lambda: encoded(scene(), "TIFF"),
    "tiff deflate": lambda: encoded(scene(), "TIFF", compression="tiff_deflate"),
    "tiff cmyk": lambda: encoded(scene().convert("CMYK"), "TIFF"),
    "tiff 16 bits": lambda: grey16("TIFF"),
    "tiff palette": lambda: encoded(scene().quantize(64), "TIFF"),
    "tiff pages": lambda: frames("TIFF"),
}


def in_pillow(data: bytes) -> Image.Image:
    """The upright image on white, by Pillow alone."""
    image = Image.open(io.BytesIO(data))
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


@pytest.mark.parametrize("name", CASES)
def test_tiles_are_pillows(name: str) -> None:
    data = CASES[name]()
    upright = in_pillow(data)
    assert read_size(data) == upright.size
    columns, rows = grid = choose_grid(*upright.size, EDGE, 6)
    count = num_tiles(grid, 1)
    tiles = cut_tiles(decode_image(data, 10**6), grid, count, EDGE)
    whole = np.asarray(resized(upright, (columns * EDGE, rows * EDGE)))
    expected = [
        whole[y * EDGE : (y + 1) * EDGE, x * EDGE : (x + 1) * EDGE]
        for y in range(rows)
        for x in range(columns)
    ]
    if count > len(expected):
        expected.append(np.asarray(resized(upright, (EDGE, EDGE))))
    expected_TCEE = torch.from_numpy(np.stack(expected)).permute(0, 3, 1, 2)
    assert tiles.shape == expected_TCEE.shape and count >= 4
    assert int((tiles.int() - expected_TCEE.int()).abs().max()) <= 2


def test_sixteen_bit_colour_keeps_the_upper_byte() -> None:
    """Pillow cannot write it; an RGB PNG of 16 bits, by hand."""
    light = np.random.default_rng(1).integers(0, 65536, (9, 7, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in light)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", 7, 9, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows))
    image = decode_image(data + chunk(b"IEND", b""), 10**6)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), (light >> 8).astype(np.uint8))
