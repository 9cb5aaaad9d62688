"""Decoding: every kind of image, every way to be broken, and pixels against Pillow's."""

from __future__ import annotations

import io

import numpy as np
import PIL
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from nvlm_train.data.images import cut_tiles, decode_image, read_size
from tests.data.conftest import draw_image, encoded, resized

LIMIT = 1_000_000


def pixels_of(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_exif_rotation(image_format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(draw_image(40, 24), image_format, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    image = decode_image(data, LIMIT)
    assert read_size(data) == upright.size == (image.shape[2], image.shape[1])
    assert (image.int() - pixels_of(upright).int()).abs().max() <= 3


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK"])
def test_colour_modes(mode: str) -> None:
    image = draw_image(30, 20).convert(mode)
    data = encoded(image, "TIFF")
    assert torch.equal(decode_image(data, LIMIT), pixels_of(image.convert("RGB")))


def test_cmyk_and_grey_jpeg() -> None:
    for mode in ("CMYK", "L"):
        data = encoded(draw_image(30, 20).convert(mode), "JPEG", quality=95)
        expected = pixels_of(Image.open(io.BytesIO(data)).convert("RGB"))
        assert (decode_image(data, LIMIT).int() - expected.int()).abs().max() <= 2


def test_alpha_is_laid_on_white() -> None:
    for mode in ("RGBA", "LA"):
        transparent = Image.new(mode, (8, 8), (0,) * len(Image.new(mode, (1, 1)).getbands()))
        assert decode_image(encoded(transparent, "PNG"), LIMIT).eq(255).all()
    palette = Image.new("P", (8, 8), 0)
    assert decode_image(encoded(palette, "PNG", transparency=0), LIMIT).eq(255).all()


def test_sixteen_bit_grey_keeps_its_range() -> None:
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    image = decode_image(encoded(Image.fromarray(ramp), "PNG"), LIMIT)
    assert torch.equal(image[0], torch.from_numpy((ramp >> 8).astype(np.uint8)))


def test_first_frame_of_an_animation() -> None:
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    for image_format in ("GIF", "WEBP", "PNG"):
        data = encoded(red, image_format, save_all=True, append_images=[blue], lossless=True)
        image = decode_image(data, LIMIT)
        assert image[0].min() > 250 and image[2].max() < 5


def test_bomb_is_refused_before_it_is_decoded() -> None:
    data = encoded(Image.new("1", (5000, 4000)), "PNG")
    assert read_size(data) == (5000, 4000)
    message = r"image is too large: width=5000 x height=4000 .* loader.max_image_pixels=1000000"
    with pytest.raises(ValueError, match=message):
        decode_image(data, LIMIT)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.999])
def test_truncated_jpeg(kept: float) -> None:
    data = encoded(draw_image(200, 200), "JPEG", quality=95)
    with pytest.raises(ValueError, match="image cannot be read: "):
        decode_image(data[: int(len(data) * kept)], LIMIT)


def test_truncated_jpeg_says_so() -> None:
    data = encoded(draw_image(200, 200), "JPEG")
    with pytest.raises(ValueError, match="image cannot be read: Premature end of JPEG file"):
        decode_image(data[:-40], LIMIT)


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_other_formats(image_format: str) -> None:
    data = encoded(draw_image(120, 120), image_format)
    with pytest.raises(ValueError, match="image cannot be read: "):
        decode_image(data[: len(data) // 2], LIMIT)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6),
    st.floats(0, 1),
)
def test_damaged_files_decode_or_raise_value_error(
    image_format: str, edits: list[tuple[float, int]], kept: float
) -> None:
    data = bytearray(encoded(draw_image(24, 24), image_format))
    for where, value in edits:
        data[int(where * (len(data) - 1))] = value
    damaged = bytes(data[: max(1, int(len(data) * kept))])
    for function in (read_size, lambda bytes_: decode_image(bytes_, LIMIT)):
        try:
            function(damaged)
        except ValueError as error:
            assert str(error).startswith("image ")


def test_other_formats_are_not_even_tried() -> None:
    with pytest.raises(ValueError, match="not a JPEG, PNG, WebP"):
        read_size(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")


def test_tiles_are_pillows_within_two_levels() -> None:
    source = draw_image(517, 301)
    image = decode_image(encoded(source, "PNG"), LIMIT)
    tiles = cut_tiles(image, (3, 2), 7, 64)
    whole = pixels_of(resized(source, (192, 128))).int()
    for number in range(6):
        row, column = divmod(number, 3)
        expected = whole[:, row * 64 : row * 64 + 64, column * 64 : column * 64 + 64]
        assert (tiles[number].int() - expected).abs().max() <= 2
    thumbnail = pixels_of(resized(source, (64, 64))).int()
    assert (tiles[6].int() - thumbnail).abs().max() <= 2
    assert tiles.shape == (7, 3, 64, 64) and tiles.dtype == torch.uint8


SHAPES = [
    # (width, height) of an image, and the one it is squashed to. Pillow 13 goes across first ...
    ((331, 207), (168, 112)),
    ((207, 331), (112, 168)),
    ((120, 90), (168, 112)),
    # ... and down first: thumbnails of upright images, and grids wider than their image.
    ((500, 750), (448, 448)),
    ((240, 320), (224, 224)),
    ((425, 550), (336, 224)),
    ((400, 300), (672, 112)),
]


def grainy(width: int, height: int) -> Image.Image:
    """Like a photograph at high sensitivity: a smooth scene under noise that resizing has to average."""
    noise = np.random.default_rng(5).normal(0, 40, (height, width, 3))
    smooth = np.asarray(draw_image(width, height)).astype(np.float64)
    return Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8))


@pytest.mark.parametrize(("source", "size"), SHAPES)
def test_grain_is_resized_as_by_pillow_before_13(
    source: tuple[int, int], size: tuple[int, int]
) -> None:
    image = grainy(*source)
    columns, rows = size[0] // 56, size[1] // 56
    tiles = cut_tiles(pixels_of(image), (columns, rows), columns * rows, 56)
    expected = pixels_of(resized(image, size))
    for number, tile in enumerate(tiles):
        top, left = 56 * (number // columns), 56 * (number % columns)
        there = expected[:, top : top + 56, left : left + 56]
        assert (tile.int() - there.int()).abs().max() <= 2


@pytest.mark.parametrize(("source", "size"), SHAPES)
def test_pillows_differ_in_the_order_of_passes_only(
    source: tuple[int, int], size: tuple[int, int]
) -> None:
    """What docs/data/encoding.md says of the Pillow that is installed, whichever it is."""
    image, bicubic = grainy(*source), Image.Resampling.BICUBIC
    here = pixels_of(image.resize(size, bicubic))
    across_first = pixels_of(resized(image, size))
    down_first = pixels_of(image.resize((image.width, size[1]), bicubic).resize(size, bicubic))
    is_new = int(PIL.__version__.split(".")[0]) >= 13
    assert torch.equal(here, across_first) or (is_new and torch.equal(here, down_first))
    assert (across_first.int() - down_first.int()).abs().max() > 2, "these shapes show nothing"


def test_an_image_of_the_right_size_is_not_resampled() -> None:
    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)
    tiles = cut_tiles(image, (3, 2), 6, 32)
    assert torch.equal(tiles[4], image[:, 32:, 32:64])
