"""Renders high-resolution pages of real text. A page is a pure function of (split, index).

A page is set in capitals on a fixed pitch, like a teleprinter's: one character per `CELL_PIXELS`
square, lines broken where they are full. A tile shows 4 x 4 characters, so that at tile resolution
(64 pixels) a character is 16 pixels wide and legible, while the thumbnail squashes the whole page
into 64 x 64 pixels: down to 2.7 pixels a character.
"""

import functools
import importlib.util
import random
import re
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from nvlm_train.demo.corpus import Split, read_paragraphs

CELL_PIXELS = 48  # three times the 16 pixels that a cell has at tile resolution
CELLS_PER_TILE_SIDE = 4
GRIDS = ((4, 1), (5, 1), (6, 1), (3, 2), (2, 3))  # (columns, rows) of tiles
MIN_PAGE_CHARS, MAX_PAGE_CHARS = 36, 64
LEGIBLE = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,'-:;()/ "
# file name and size in pixels: the widest capital just fills its cell
FONTS = (
    ("DejaVuSans", 46),
    ("DejaVuSans-Bold", 42),
    ("DejaVuSansMono-Bold", 50),
    ("DejaVuSerif", 44),
)


@dataclass(frozen=True)
class Page:
    """Holds a rendered page, the text on it, and the tile grid that fits its shape."""

    image: Image.Image
    text: str
    grid: tuple[int, int]  # (columns, rows) of tiles


@functools.cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """Loads one of the DejaVu fonts inside matplotlib, without importing matplotlib."""
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("matplotlib carries the demo's fonts: pip install matplotlib")
    return ImageFont.truetype(Path(spec.origin).parent / f"mpl-data/fonts/ttf/{name}.ttf", size)


def to_capitals(text: str) -> str:
    """Returns the text as a teleprinter sets it: capitals, digits and a few marks, single spaces."""
    kept = "".join(char for char in text.upper() if char in LEGIBLE)
    return re.sub(r" +", " ", kept).strip()


def draw_text(rng: random.Random, split: Split, min_chars: int, max_chars: int) -> str:
    """Returns a passage of whole words in capitals, which starts at a word of a paragraph of the split."""
    paragraphs = read_paragraphs(split)
    words: list[str] = []
    while len(" ".join(words)) < max_chars + 1:
        words = to_capitals(rng.choice(paragraphs)).split(" ")
        words = words[rng.randrange(len(words)) :]
    length = rng.randint(min_chars, max_chars)
    while len(" ".join(words)) > length:
        words.pop()
    return " ".join(words)


def set_cells(image: Image.Image, text: str, rng: random.Random) -> None:
    """Draws `text` into the image's cells, row by row, in one random font and colour."""
    draw = ImageDraw.Draw(image)
    name, size = rng.choice(FONTS)
    font = _font(name, size - rng.randrange(6))
    ink = tuple(rng.randrange(90) for _ in range(3))
    shift_x, shift_y = rng.randint(-3, 3), rng.randint(-3, 3)
    per_line = image.width // CELL_PIXELS
    for index, char in enumerate(text):
        row, column = divmod(index, per_line)
        x = (column + 0.5) * CELL_PIXELS + shift_x
        y = (row + 0.86) * CELL_PIXELS + shift_y  # the baseline: capitals stand centred
        draw.text((x, y), char, fill=ink, font=font, anchor="ms")


def blank_paper(grid: tuple[int, int], rng: random.Random) -> Image.Image:
    """Returns empty light paper of `grid` tiles, with 192 pixels per side of a tile."""
    side = CELL_PIXELS * CELLS_PER_TILE_SIDE
    paper = tuple(rng.randint(200, 255) for _ in range(3))
    return Image.new("RGB", (grid[0] * side, grid[1] * side), paper)


def render_page(index: int, split: Split) -> Page:
    """Renders page `index` of a split: several tiles of text, at most 64 characters of whole words."""
    rng = random.Random(f"page/{split}/{index}")
    grid = rng.choice(GRIDS)
    text = draw_text(rng, split, MIN_PAGE_CHARS, MAX_PAGE_CHARS)
    image = blank_paper(grid, rng)
    set_cells(image, text, rng)
    return Page(image, text, grid)


def render_strip(index: int, split: Split) -> Page:
    """Renders strip `index` of a split: one tile of text, at most 16 characters, legible without tiling."""
    rng = random.Random(f"strip/{split}/{index}")
    text = draw_text(rng, split, 6, CELLS_PER_TILE_SIDE**2)
    image = blank_paper((1, 1), rng)
    set_cells(image, text, rng)
    return Page(image, text, (1, 1))
