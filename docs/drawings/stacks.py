"""Drawing B: the stacks of NVLM-D, X and H side by side, coloured by the route that tiles take.

The routes are those of `nvlm_train.routes`; the colours are those of `nvlm data show`. Numbers are
those of the paper's 72B models.
"""

from __future__ import annotations

from dataclasses import dataclass

from svg import SOFT, Paint, Sheet

COLUMN, GAP, MARGIN = 344, 34, 28
WIDTH, HEIGHT = 2 * MARGIN + 3 * COLUMN + 2 * GAP, 940
CONTEXT, STACK = 92, 226
"""Widths of the context and, beside it, of the language model."""
LOGITS, CROSSING, PLAIN, SEQUENCE, PROJECTOR, ENCODER, IMAGES = 206, 298, 460, 610, 684, 764, 852
"""Where the parts begin, from the top of the drawing: what runs first is the lowest."""

DECODER, CROSS = Paint("#dce8fb", "#3d6fb6"), Paint("#f7dfcb", "#c8662b")
SHARED, TEXT = Paint("#efede8", "#a9a69f"), Paint("#ffffff", "#c9c6bf")

PLAIN_LAYER = ("self-attention", "MLP")
CROSSING_LAYER = ("self-attention", "gated cross-attention", "MLP")
TILES = ("<tile_1>", "<tile_2>", "<tile_3>", "<tile_4>", "<tile_5>", "<tile_6>")


@dataclass(frozen=True)
class Model:
    """What differs between the three."""

    name: str
    remarks: tuple[str, ...]
    thumbnail_crosses: bool
    tiles_cross: bool
    projector: str
    sequence: tuple[tuple[str, float], ...]
    """What stands in the decoder's sequence, and the width to draw it with; slots hold features."""
    context: tuple[tuple[str, str], ...]
    """The cells of the cross-attention context: a tag before the tile, where there is one."""


MODELS = (
    Model(
        "NVLM-D",
        (
            "Every tile stands in the sequence, behind its tag.",
            "Sequence: 7 x (5 + 256) = 1,827 tokens.",
            "Context: there is none.",
        ),
        False,
        False,
        "LayerNorm, linear, GELU, linear",
        (
            ("text", 36),
            ("<tile_1>", 58),
            ("slots", 56),
            ("...", 22),
            ("<tile_global>", 84),
            ("slots", 56),
            ("text", 32),
        ),
        (),
    ),
    Model(
        "NVLM-X",
        (
            "Every tile is read by cross-attention; a tag sees its own.",
            "Sequence: 7 x 5 = 35 tokens.",
            "Context: 7 x 256 = 1,792 positions.",
        ),
        True,
        True,
        "LayerNorm, linear",
        (("text", 34), ("<tile_1>", 56), ("...", 18), ("<tile_global>", 84), ("text", 34)),
        tuple(("", f"tile {number}") for number in range(1, 7)) + (("", "thumbnail"),),
    ),
    Model(
        "NVLM-H",
        (
            "The thumbnail goes as in D, the other tiles as in X.",
            "Sequence: 5 + 256 = 261 tokens.",
            "Context: 6 x (5 + 256) = 1,566 positions.",
        ),
        False,
        True,
        "LayerNorm, linear, GELU, linear",
        (("text", 44), ("<tile_global>", 86), ("slots", 56), ("text", 40)),
        tuple((tag, "256") for tag in TILES),
    ),
)


def draw() -> bytes:
    """The drawing's file."""
    sheet = Sheet(WIDTH, HEIGHT, "The stacks of NVLM-D, NVLM-X and NVLM-H")
    title = "NVLM-D, X and H: which route a tile takes"
    sheet.text(MARGIN, 42, title, size=20, anchor="start", face="bold")
    _legend(sheet)
    for number, model in enumerate(MODELS):
        left = MARGIN + number * (COLUMN + GAP)
        _head(sheet, model, left)
        _language_model(sheet, model, left)
        _sequence(sheet, model, left)
        _context(sheet, model, left)
        _vision(sheet, model, left)
    return sheet.to_bytes()


def _legend(sheet: Sheet) -> None:
    x = MARGIN
    for paint, words in (
        (DECODER, "decoder route: features stand in the sequence"),
        (CROSS, "cross route: features are keys and values of cross-attention"),
        (SHARED, "what both routes share"),
    ):
        sheet.box(x, 60, 16, 16, paint)
        sheet.text(x + 24, 73, words, anchor="start", colour=SOFT)
        x += 24 + 7 * len(words) + 28


def _head(sheet: Sheet, model: Model, left: float) -> None:
    sheet.text(left, 118, model.name, size=17, anchor="start", face="bold")
    for number, words in enumerate(model.remarks):
        sheet.text(left, 140 + 17 * number, words, size=12, anchor="start", colour=SOFT)


def _stack(model: Model, left: float) -> tuple[float, float]:
    """Where the language model stands: its left edge and its width."""
    return (left + COLUMN - STACK, STACK) if model.context else (left, COLUMN)


def _language_model(sheet: Sheet, model: Model, left: float) -> None:
    x, width = _stack(model, left)
    middle = x + width / 2
    _layers(sheet, x, width, PLAIN, "7 layers" if model.context else "80 layers", PLAIN_LAYER)
    sheet.arrow([(middle, SEQUENCE - 2), (middle, PLAIN + 106)])
    if not model.context:
        _logits(sheet, x, width, PLAIN - 58)
        return
    _layers(sheet, x, width, CROSSING, "the 8th layer", CROSSING_LAYER)
    sheet.arrow([(middle, PLAIN), (middle, CROSSING + 142)])
    sheet.box(x - 8, CROSSING - 34, width + 16, 318, Paint("none", SHARED.edge), dash="4 3")
    sheet.text(middle, CROSSING - 14, "10 times, which makes 80 layers", size=12, colour=SOFT)
    _logits(sheet, x, width, LOGITS)


def _layers(
    sheet: Sheet, x: float, width: float, top: float, name: str, inside: tuple[str, ...]
) -> None:
    """A frame of layers; what runs first is the lowest."""
    sheet.box(x, top, width, 34 + 36 * len(inside), SHARED)
    sheet.text(x + 12, top + 20, name, size=12, anchor="start", face="bold")
    for number, words in enumerate(reversed(inside)):
        y = top + 30 + 36 * number
        crosses = "cross" in words
        paint = CROSS if crosses else TEXT
        sheet.box(x + 12, y, width - 24, 26, paint)
        sheet.text(x + width / 2, y + 17, words)


def _logits(sheet: Sheet, x: float, width: float, top: float) -> None:
    """The box, and the arrow from the frame that ends 28 pixels below it."""
    sheet.arrow([(x + width / 2, top + 58), (x + width / 2, top + 30)])
    sheet.box(x, top, width, 30, SHARED)
    sheet.text(x + width / 2, top + 20, "logits, where a token is trained")


def _sequence(sheet: Sheet, model: Model, left: float) -> None:
    x, width = _stack(model, left)
    sheet.text(x, SEQUENCE - 8, "sequence", size=12, anchor="start", face="bold")
    for words, size in model.sequence:
        is_slots = words == "slots"
        paint = DECODER if is_slots else TEXT
        sheet.box(x, SEQUENCE, size, 28, paint, radius=2)
        is_tag = words.startswith("<")
        sheet.text(
            x + size / 2,
            SEQUENCE + 18,
            words,
            size=10 if is_tag else 12,
            face="code" if is_tag else "plain",
        )
        x += size


def _context(sheet: Sheet, model: Model, left: float) -> None:
    """Its cells, the first tile's at the top, and the way to cross-attention."""
    if not model.context:
        return
    top = SEQUENCE + 30 - 26 * len(model.context)
    sheet.text(left, top - 8, "context", size=12, anchor="start", face="bold")
    for number, (tag, tile) in enumerate(model.context):
        y, tag_width = top + 26 * number, 58 if tag else 0
        if tag:
            sheet.box(left, y, tag_width, 24, TEXT, radius=2)
            sheet.text(left + tag_width / 2, y + 16, tag, size=10, face="code")
        size = CONTEXT - tag_width
        sheet.box(left + tag_width, y, size, 24, CROSS, radius=2)
        sheet.text(left + tag_width + size / 2, y + 16, tile, size=12)
    x, _ = _stack(model, left)
    middle, y = left + CONTEXT - 20, CROSSING + 79
    sheet.arrow([(middle, top), (middle, y), (x + 12, y)], colour=CROSS.edge)
    sheet.text(middle - 8, y + 4, "keys,", size=12, anchor="end", colour=CROSS.edge)
    sheet.text(middle - 8, y + 19, "values", size=12, anchor="end", colour=CROSS.edge)


def _vision(sheet: Sheet, model: Model, left: float) -> None:
    tiles, thumbnail = left + 45, left + COLUMN - 100
    for route, x, crosses in (
        ("tiles", tiles, model.tiles_cross),
        ("thumbnail", thumbnail, model.thumbnail_crosses),
    ):
        colour = CROSS.edge if crosses else DECODER.edge
        end = _entry(model, left, route, crosses)
        bend = SEQUENCE + 55
        sheet.arrow([(x, PROJECTOR), (x, bend), (end, bend), (end, SEQUENCE + 30)], colour=colour)
        sheet.arrow([(x, ENCODER), (x, PROJECTOR + 44)], colour=colour)
        sheet.arrow([(x, IMAGES), (x, ENCODER + 44)], colour=colour)
    _part(sheet, left, PROJECTOR, "projector", model.projector)
    _part(sheet, left, ENCODER, "vision encoder, frozen", "pixel shuffle: 256 features of a tile")
    _images(sheet, model, tiles, thumbnail)


def _entry(model: Model, left: float, route: str, crosses: bool) -> float:
    """Where features enter the sequence or the context."""
    if crosses:
        return left + (45 if route == "tiles" else CONTEXT - 20)
    x, _ = _stack(model, left)
    slots = []
    for words, size in model.sequence:
        if words == "slots":
            slots.append(x + size / 2)
        x += size
    return slots[0] if route == "tiles" else slots[-1]


def _part(sheet: Sheet, left: float, top: float, name: str, about: str) -> None:
    sheet.box(left, top, COLUMN, 44, SHARED)
    sheet.text(left + COLUMN / 2, top + 19, name, face="bold")
    sheet.text(left + COLUMN / 2, top + 35, about, size=12, colour=SOFT)


def _images(sheet: Sheet, model: Model, tiles: float, thumbnail: float) -> None:
    paint = CROSS if model.tiles_cross else DECODER
    for number in range(6):
        x, y = tiles - 42 + 29 * (number % 3), IMAGES + 29 * (number // 3)
        sheet.box(x, y, 26, 26, paint, radius=2)
        sheet.text(x + 13, y + 17, str(number + 1), size=12)
    paint = CROSS if model.thumbnail_crosses else DECODER
    sheet.box(thumbnail - 27, IMAGES, 55, 55, paint, radius=2)
    sheet.text(tiles, IMAGES + 74, "6 tiles", size=12, colour=SOFT)
    sheet.text(thumbnail, IMAGES + 74, "thumbnail", size=12, colour=SOFT)
