"""Text with boxes: `<ref>text</ref><box>(x1,y1),(x2,y2)</box>`, four corners as `<quad>`.

The text form is the paper's (NVLM 1.0, figure 11); coordinates are integers from 0 to 1000, which
its example suggests and no source states.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from nvlm_train.data.images import read_size
from nvlm_train.data.prepare.inputs.chats import image_names, line_of, with_id
from nvlm_train.data.prepare.inputs.entries import (
    Entries,
    InputSpec,
    Lines,
    Parts,
    find_lines,
    parse_object,
)
from nvlm_train.data.prepare.inputs.files import Files, open_files

SCALE = 1000
_MARKUP = re.compile(r"</?(?:ref|box|quad)>")


def open_ocr(spec: InputSpec, spool: Path) -> Entries:
    """Opens JSON Lines of `{"image", "regions": [{"text", "box": [x1, y1, x2, y2]}]}`.

    A region may have `quad` instead: x and y of four corners. Coordinates are pixels of the upright
    image, or of a canvas that the entry's `width` and `height` give.
    """
    parse = partial(_parts, open_files(spec.images))
    return Lines(spec.paths, find_lines(spec.paths, spool), parse, line_of)


def grounded(text: str, corners: list[tuple[float, float]], width: float, height: float) -> str:
    """Returns one region as text. Parts outside the canvas are cut off.

    >>> grounded("Hi", [(10, 20), (60, 40)], 100, 200)
    '<ref>Hi</ref><box>(100,100),(600,200)</box>'

    Raises:
        ValueError: nothing of the region lies on the canvas, or the text holds such markup itself.
    """
    if _MARKUP.search(text):
        raise ValueError(f"text={text!r} holds <ref>, <box> or <quad> itself; remove that markup")
    xs, ys = zip(*corners, strict=True)
    outside = min(xs) >= width or min(ys) >= height or max(xs) <= 0 or max(ys) <= 0
    if outside or not all(map(math.isfinite, (*xs, *ys))):
        raise ValueError(
            f"region {text!r} at {corners} lies outside the canvas of {width} x {height}; "
            "give the canvas that its coordinates refer to as width and height"
        )
    points = ",".join(f"({_scaled(x, width)},{_scaled(y, height)})" for x, y in corners)
    name = "box" if len(corners) == 2 else "quad"
    return f"<ref>{text}</ref><{name}>{points}</{name}>"


def _scaled(value: float, size: float) -> int:
    return min(SCALE, max(0, math.floor(value / size * SCALE + 0.5)))


def _parts(files: Files, line: bytes) -> Parts:
    item = parse_object(line)
    names = image_names(item, "image")
    if len(names) != 1:
        raise ValueError(f"image={item.get('image')!r} must name one image")
    data = files.read(names[0])
    width, height = _canvas(item, data)
    regions = item.get("regions")
    if not isinstance(regions, list) or not regions:
        raise ValueError("regions must be a list of objects with text and box or quad, not empty")
    texts = [_region(region, width, height) for region in regions]
    record = {"text": "\n".join(texts), "task": "grounded_ocr"}
    return with_id(record, item.get("id")), [(names[0], data)]


def _canvas(item: Mapping[str, Any], data: bytes) -> tuple[float, float]:
    width, height = read_size(data)
    canvas = (item.get("width", width), item.get("height", height))
    if not all(isinstance(v, int | float) and 0 < v < math.inf for v in canvas):
        raise ValueError(f"width, height={canvas} must be positive numbers")
    return canvas


def _region(region: object, width: float, height: float) -> str:
    fields = region if isinstance(region, dict) else {}
    text, box, quad = fields.get("text"), fields.get("box"), fields.get("quad")
    numbers = box if box is not None else quad
    count = 4 if box is not None else 8
    if not isinstance(text, str) or not text.strip() or (box is None) == (quad is None):
        raise ValueError(f"region={region!r} must have a text and either a box or a quad")
    if (
        not isinstance(numbers, list)
        or len(numbers) != count
        or not all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers)
    ):
        raise ValueError(f"region={region!r}: a box has 4 numbers, a quad 8")
    corners = list(zip(numbers[::2], numbers[1::2], strict=True))
    if box is not None and (corners[0][0] > corners[1][0] or corners[0][1] > corners[1][1]):
        raise ValueError(f"region={region!r}: a box is left, top, right, bottom")
    return grounded(text.strip(), corners, width, height)
