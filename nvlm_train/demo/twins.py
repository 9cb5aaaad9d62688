"""Text twins of the pictures, on which the language model learns to read tiles before it has eyes.

In a twin every visual token of an image is replaced by one text token that says what the picture
shows there: a character of a page, or the colour or shape of a drawing. Layout, tile tags,
questions and answers are those of real samples, so that a projector has a place to map to.
A piece of a prompt is text, or a list of slot texts of one token each.
"""

import random
from collections import defaultdict

from nvlm_train.demo.captions import (
    CAPTION_PROMPT,
    COLOURS,
    READ_PROMPT,
    SHAPES,
    Question,
    read_captions,
    read_questions,
)
from nvlm_train.demo.pages import (
    CELLS_PER_TILE_SIDE,
    GRIDS,
    MAX_PAGE_CHARS,
    MIN_PAGE_CHARS,
    draw_text,
)

Piece = str | list[str]
Twin = tuple[list[Piece], str]  # (pieces of the user turn, answer)

NUM_SLOTS = CELLS_PER_TILE_SIDE**2  # visual tokens of a tile
ILLEGIBLE = "#"
THUMBNAIL_TAG = "<tile_global_thumbnail>"


def page_slots(text: str, grid: tuple[int, int]) -> list[list[str]]:
    """The characters that each tile of a page shows, row-major, blanks as spaces."""
    columns, rows = grid
    side, per_line = CELLS_PER_TILE_SIDE, columns * CELLS_PER_TILE_SIDE
    filled = text.ljust(per_line * rows * side)
    tiles = []
    for tile in range(columns * rows):
        top, left = tile // columns * side, tile % columns * side
        starts = [(top + line) * per_line + left for line in range(side)]
        tiles.append([char for start in starts for char in filled[start : start + side]])
    return tiles


def page_twin(rng: random.Random) -> Twin:
    """A page of several tiles with their tags, to be read out."""
    grid = rng.choice(GRIDS)
    text = draw_text(rng, "train", MIN_PAGE_CHARS, MAX_PAGE_CHARS)
    pieces: list[Piece] = ["<Image>"]
    for number, slots in enumerate(page_slots(text, grid), start=1):
        pieces += [f"<tile_{number}>", slots]
    pieces += [THUMBNAIL_TAG, [ILLEGIBLE] * NUM_SLOTS, f"</Image>\n{READ_PROMPT}"]
    return pieces, text


def one_tile(slots: list[str], question: str, rng: random.Random) -> list[Piece]:
    """The user turn of a one-tile image, with the thumbnail's tag (SFT) or bare (pretraining)."""
    tag = THUMBNAIL_TAG if rng.random() < 0.6 else ""
    return ["<Image>" + tag, slots, f"</Image>\n{question}"]


def strip_twin(rng: random.Random) -> Twin:
    """A tile of 6 to 16 characters, to be read out."""
    text = draw_text(rng, "train", 6, NUM_SLOTS)
    return one_tile(list(text.ljust(NUM_SLOTS)), READ_PROMPT, rng), text


def _shape_slots(caption: str, rng: random.Random) -> list[str]:
    """Blanks, and the words of the caption in at least two of the slots."""
    words = [f" {word}" if word in COLOURS else word for word in caption.split()[1:]]
    slots = [rng.choice([" ", *words]) for _ in range(NUM_SLOTS)]
    for slot, word in zip(rng.sample(range(NUM_SLOTS), len(words)), words, strict=True):
        slots[slot] = word
    return slots


class ShapeTwins:
    """Twins of easy-vqa's training pictures: captions and training questions about them."""

    def __init__(self) -> None:
        self.questions: dict[int, list[Question]] = defaultdict(list)
        for question in read_questions("train"):
            self.questions[question.image_id].append(question)
        # Only pictures of which both colour and shape are known can be written down.
        known = {i: c for i, c in read_captions().items() if len(c.split()) == 3}
        self.captions = [(i, c) for i, c in known.items() if c.endswith(SHAPES)]

    def draw(self, rng: random.Random) -> Twin:
        """A caption (one time in five) or a question about one picture."""
        image_id, caption = rng.choice(self.captions)
        slots = _shape_slots(caption, rng)
        if rng.random() < 0.2:
            return one_tile(slots, CAPTION_PROMPT, rng), caption
        question = rng.choice(self.questions[image_id])
        return one_tile(slots, question.text, rng), question.answer
