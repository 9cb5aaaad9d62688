"""A sheet of SVG: boxes, words and arrows, written in the same bytes on every machine.

Lengths are pixels of the drawing; x grows to the right and y downward. No font is measured, so
whoever places a text leaves room for one of another width.
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

SANS = "system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"
MONO = "ui-monospace, 'SF Mono', Menlo, Consolas, 'DejaVu Sans Mono', monospace"
INK, SOFT = "#1d1f23", "#62666e"

_HEAD = 6
"""The length of an arrow's head."""


@dataclass(frozen=True)
class Paint:
    """The colours of a box."""

    fill: str
    edge: str


BLANK = Paint("#ffffff", "#ffffff")
"""White paper."""


class Sheet:
    """One drawing on white paper, so that it is legible on a dark page too."""

    def __init__(self, width: float, height: float, title: str) -> None:
        self._root = ET.Element(
            "svg",
            {
                "xmlns": "http://www.w3.org/2000/svg",
                "viewBox": f"0 0 {_number(width)} {_number(height)}",
                "width": _number(width),
                "height": _number(height),
                "font-family": SANS,
                "role": "img",
            },
        )
        ET.SubElement(self._root, "title").text = title
        self.box(0, 0, width, height, BLANK, radius=10)

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        paint: Paint,
        *,
        radius: float = 4,
        dash: str = "",
    ) -> None:
        """Draws a rectangle with round corners."""
        place = {"x": x, "y": y, "width": width, "height": height, "rx": radius}
        dashed = {"stroke-dasharray": dash} if dash else {}
        self._add("rect", place, {"fill": paint.fill, "stroke": paint.edge, **dashed})

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        size: float = 13,
        colour: str = INK,
        anchor: str = "middle",
        face: Literal["plain", "bold", "code"] = "plain",
    ) -> None:
        """Writes one line; y is its baseline, and `anchor` says which end of it is at x."""
        style = {"text-anchor": anchor, "fill": colour}
        if face == "bold":
            style["font-weight"] = "600"
        elif face == "code":
            style["font-family"] = MONO
        self._add("text", {"x": x, "y": y, "font-size": size}, style).text = words

    def line(
        self, points: Sequence[tuple[float, float]], *, colour: str = SOFT, dash: str = ""
    ) -> None:
        """Draws a line through the points."""
        dashed = {"stroke-dasharray": dash} if dash else {}
        words = " ".join(f"{_number(x)},{_number(y)}" for x, y in points)
        self._add("polyline", {}, {"points": words, "fill": "none", "stroke": colour, **dashed})

    def dot(self, x: float, y: float, *, colour: str = SOFT) -> None:
        """Draws the end of a connection that has no direction."""
        self._add("circle", {"cx": x, "cy": y, "r": 3}, {"fill": colour})

    def arrow(
        self, points: Sequence[tuple[float, float]], *, colour: str = SOFT, dash: str = ""
    ) -> None:
        """Draws a line through the points with a head at the last."""
        (x0, y0), (x, y) = points[-2:]
        length = math.hypot(x - x0, y - y0)
        dx, dy = _HEAD * (x - x0) / length, _HEAD * (y - y0) / length
        base = (x - dx, y - dy)
        self.line([*points[:-1], base], colour=colour, dash=dash)
        corners = [
            (x, y),
            (base[0] - dy / 2, base[1] + dx / 2),
            (base[0] + dy / 2, base[1] - dx / 2),
        ]
        words = " ".join(f"{_number(cx)},{_number(cy)}" for cx, cy in corners)
        self._add("polygon", {}, {"points": words, "fill": colour})

    def label(
        self, x: float, y: float, words: str, *, size: float = 11.5, colour: str = INK
    ) -> None:
        """Writes the type of what flows, in code's font on a strip of paper around (x, y)."""
        width = len(words) * size * 0.62 + 8
        self.box(x - width / 2, y - 9, width, 18, BLANK, radius=3)
        self.text(x, y + size * 0.34, words, size=size, colour=colour, face="code")

    def to_bytes(self) -> bytes:
        """The file's contents."""
        ET.indent(self._root)
        return ET.tostring(self._root, encoding="us-ascii") + b"\n"

    def _add(self, kind: str, places: dict[str, float], style: dict[str, str]) -> ET.Element:
        numbers = {name: _number(value) for name, value in places.items()}
        return ET.SubElement(self._root, kind, {**numbers, **style})


def _number(value: float) -> str:
    """Tenths of a pixel are enough; whole ones have no point."""
    return f"{round(value, 1):g}"
