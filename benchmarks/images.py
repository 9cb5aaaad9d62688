"""Measures JPEG to uint8 tiles on one core, beside the usual Pillow pipeline.

    python -m benchmarks.images

Both make the tiles of a 1600 x 1200 photo-like image and of a 1700 x 2200 page of text: six
regular tiles of 448 x 448 and the thumbnail. The baseline is Pillow's decoder, Pillow's bicubic
filter, then what torchvision's ToTensor and Normalize do (division by 255 in fp32, the ImageNet
mean and deviation). The two take turns; the ratio is of medians of CPU seconds, which other
programs on the machine disturb less than they do wall seconds. The tiles' largest difference to
Pillow's, in levels of 255, is measured in the same run: of Pillow as it is installed, and of its
filter with the pass across before the pass down, which is what Pillow 10 to 12 do and torch does.
(Pillow 13 goes down first where that is cheaper, for example in thumbnails of upright images.)
That also of an upright photo with grain, as a sensor has it, and of a slide of text.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import PIL
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from nvlm_train.data.images import cut_tiles, decode_image
from nvlm_train.tiling import Grid, choose_grid, num_tiles
from nvlm_train.vision.features import IMAGENET_MEAN, IMAGENET_STD

TILE = 448
QUALITY = 84


def photo(width: int = 1600, height: int = 1200, seed: int = 0) -> Image.Image:
    """Returns noise of several scales, as natural images have it: detail falls with frequency."""
    draw = np.random.default_rng(seed)
    total = np.zeros((height, width, 3), dtype=np.float32)
    for octave in range(2, 10):
        grid = draw.normal(0.0, 0.6**octave, (2**octave, 2**octave, 3)).astype(np.float32)
        for channel in range(3):
            layer = Image.fromarray(grid[:, :, channel])
            total[:, :, channel] += np.asarray(layer.resize((width, height), Image.BICUBIC))
    total = (total - total.mean()) / total.std()
    return Image.fromarray(np.clip(128 + 52 * total, 0, 255).astype(np.uint8))


def document(width: int = 1700, height: int = 2200, seed: int = 0) -> Image.Image:
    """Returns a white page full of black text."""
    draw = np.random.default_rng(seed)
    page = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(28)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz    "))
    for top in range(120, height - 120, 42):
        pen.text((130, top), "".join(draw.choice(letters, 88)), "black", font)
    return page


def grainy(width: int = 480, height: int = 640, deviation: float = 25.0) -> Image.Image:
    """Returns an upright photo of COCO's size with grain."""
    noise = np.random.default_rng(1).normal(0.0, deviation, (height, width, 3))
    pixels = np.asarray(photo(width, height)).astype(np.float64) + noise
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def jpeg(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=QUALITY)
    return stream.getvalue()


Resize = Callable[[Image.Image, tuple[int, int]], Image.Image]


def as_installed(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resizes with one call of Pillow's bicubic filter."""
    return image.resize(size, Image.BICUBIC)


def across_first(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resizes with the same filter, rows before columns."""
    return image.resize((size[0], image.height), Image.BICUBIC).resize(size, Image.BICUBIC)


def pillow_tiles(
    image: Image.Image, grid: Grid, count: int, resize: Resize = as_installed
) -> list[Image.Image]:
    """Does the released preprocessing (InternVL's `dynamic_preprocess`) in Pillow."""
    columns, rows = grid
    whole = resize(image, (columns * TILE, rows * TILE))
    tiles = [
        whole.crop((x * TILE, y * TILE, (x + 1) * TILE, (y + 1) * TILE))
        for y in range(rows)
        for x in range(columns)
    ]
    return tiles + [resize(image, (TILE, TILE))] * (count - columns * rows)


def to_tensor(tiles: list[Image.Image]) -> Tensor:
    """Does what torchvision's ToTensor and Normalize do: fp32 [T, 3, E, E]."""
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (IMAGENET_MEAN, IMAGENET_STD))
    done = []
    for tile in tiles:
        pixels = torch.from_numpy(np.array(tile)).permute(2, 0, 1).contiguous()
        done.append(pixels.to(torch.float32).div(255).sub_(mean).div_(std))
    return torch.stack(done)


def medians(runs: list[Callable[[], object]], repeats: int) -> list[float]:
    """Returns the median CPU seconds of each function. They take turns."""
    spent: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run()
    for _ in range(repeats):
        for each, run in zip(spent, runs, strict=True):
            started = time.process_time()
            run()
            each.append(time.process_time() - started)
    return [statistics.median(each) for each in spent]


def measure(name: str, image: Image.Image, repeats: int) -> dict[str, float]:
    data = jpeg(image)
    grid = choose_grid(*image.size, TILE, 6)
    count = num_tiles(grid, 1)

    def ours() -> Tensor:
        return cut_tiles(decode_image(data, 10**8), grid, count, TILE)

    def pillow() -> list[Image.Image]:
        return pillow_tiles(Image.open(io.BytesIO(data)).convert("RGB"), grid, count)

    base, own = medians([lambda: to_tensor(pillow()), ours], repeats)
    return {
        f"{name}_pillow_per_second": round(1 / base, 1),
        f"{name}_per_second": round(1 / own, 1),
        f"{name}_ratio": round(base / own, 2),
    }


def differences(name: str, image: Image.Image) -> dict[str, float]:
    """Returns the largest and mean difference to Pillow's tiles, in levels of 255."""
    data = jpeg(image)
    grid = choose_grid(*image.size, TILE, 6)
    count = num_tiles(grid, 1)
    ours = cut_tiles(decode_image(data, 10**8), grid, count, TILE).numpy().astype(np.int16)
    found: dict[str, float] = {}
    for order, resize in (("across_first", across_first), ("as_installed", as_installed)):
        tiles = pillow_tiles(Image.open(io.BytesIO(data)).convert("RGB"), grid, count, resize)
        expected = np.stack([np.asarray(tile) for tile in tiles]).transpose(0, 3, 1, 2)
        difference = np.abs(ours - expected.astype(np.int16))
        found[f"{name}_{order}_largest_difference"] = int(difference.max())
        found[f"{name}_{order}_mean_difference"] = round(float(difference.mean()), 4)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    figures = measure("photo", photo(), repeats) | measure("document", document(), repeats)
    made = {"photo": photo(), "document": document()}
    made |= {"grainy": grainy(), "slide": document(1200, 900)}
    for name, image in made.items():
        figures |= differences(name, image)
    print(json.dumps({"pillow": PIL.__version__} | figures))


if __name__ == "__main__":
    main()
