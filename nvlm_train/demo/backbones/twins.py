"""Makes text twins of images, from which the language model learns to read tiles as text.

In a twin every visual token of an image is replaced by one text token that says what the image
shows there: a character of a page, or the colour or shape of a drawing. Layout, tile tags,
questions and answers are those of real samples, so that a projector has a place to map to.
A piece of a prompt is text, or a list of slot texts of one token each.
"""

import random
from collections import defaultdict

from nvlm_train.demo.captions import (
    CAPTION_PROMPT,
    NEGATIONS,
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
    """Returns the characters that each tile of a page shows, row by row, with blanks as spaces."""
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
    """Returns a page of several tiles with their tags, and its text as the answer."""
    grid = rng.choice(GRIDS)
    text = draw_text(rng, "train", MIN_PAGE_CHARS, MAX_PAGE_CHARS)
    pieces: list[Piece] = ["<Image>"]
    for number, slots in enumerate(page_slots(text, grid), start=1):
        pieces += [f"<tile_{number}>", slots]
    pieces += [THUMBNAIL_TAG, [ILLEGIBLE] * NUM_SLOTS, f"</Image>\n{READ_PROMPT}"]
    return pieces, text


def one_tile(slots: list[str], question: str, rng: random.Random) -> list[Piece]:
    """Returns the user turn of a one-tile image, with the thumbnail's tag (SFT) or without (pretraining)."""
    tag = THUMBNAIL_TAG if rng.random() < 0.6 else ""
    return ["<Image>" + tag, slots, f"</Image>\n{question}"]


def strip_twin(rng: random.Random) -> Twin:
    """Returns a tile of at most 16 characters, and its text as the answer."""
    text = draw_text(rng, "train", 6, NUM_SLOTS)
    return one_tile(list(text.ljust(NUM_SLOTS)), READ_PROMPT, rng), text


def _shape_slots(caption: str, rng: random.Random) -> list[str]:
    """Returns blanks and words of the caption, with each word in at least one slot."""
    words = [f" {word}" for word in caption.split()[1:]]  # the tokens that questions use, too
    slots = [rng.choice([" ", *words]) for _ in range(NUM_SLOTS)]
    for slot, word in zip(rng.sample(range(NUM_SLOTS), len(words)), words, strict=True):
        slots[slot] = word
    return slots


def _kind_of(question: Question, caption: str) -> str:
    """Returns `open`, or for a yes/no question `present` or `absent`, after `negated ` if it is negated."""
    if question.answer not in ("yes", "no"):
        return "open"
    words = question.text[:-1].split()
    kind = "absent" if set(caption.split()[1:]).isdisjoint(words) else "present"
    return kind if NEGATIONS.isdisjoint(words) else f"negated {kind}"


class ShapeTwins:
    """Draws twins of easy-vqa's training images: captions and training questions about them.

    Four of five yes/no questions ask for something that is not there, and half of them are negated.
    Drawn at these rates they teach the model to answer without looking. So present and absent things
    are drawn equally often, and most questions are not negated: while both are equally frequent, the
    answer, present XOR negated, gives no gradient to start from.
    """

    KINDS = ("caption", "open", *(3 * ("present", "absent")), "negated present", "negated absent")

    def __init__(self) -> None:
        # Only images of which both colour and shape are known can be written down.
        captions = {i: c for i, c in read_captions().items() if len(c.split()) == 3}
        captions = {i: c for i, c in captions.items() if c.endswith(SHAPES)}
        self.captions = list(captions.values())
        self.questions: dict[str, list[tuple[str, Question]]] = defaultdict(list)
        for question in read_questions("train"):
            if caption := captions.get(question.image_id):
                self.questions[_kind_of(question, caption)].append((caption, question))

    def draw(self, rng: random.Random) -> Twin:
        """Returns a caption of an image or a question about it."""
        kind = rng.choice(self.KINDS)
        if kind == "caption":
            caption = rng.choice(self.captions)
            return one_tile(_shape_slots(caption, rng), CAPTION_PROMPT, rng), caption
        caption, question = rng.choice(self.questions[kind])
        return one_tile(_shape_slots(caption, rng), question.text, rng), question.answer
