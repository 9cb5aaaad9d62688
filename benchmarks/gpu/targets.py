"""What is asked of one H100 or H200, and how a result of benchmarks/gpu answers. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
Rows = Mapping[str, Row]

ROWS = ("d", "x", "h", "text", "transformers", "encoder_300m", "encoder_6b", "d_stage_1")
"""Rows that answer all targets; they must be of one run."""


@dataclass(frozen=True)
class Target:
    """One line of what is asked."""

    title: str
    asked: float
    """At least this much; for `most`, between `asked` and it."""
    read: Callable[[Rows], float]
    """Reads the answer off the rows of one run.

    Raises:
        LookupError: a row, or a figure of it, is not there.
        TypeError: a figure is null, as memory is on a CPU.
    """
    most: float | None = None
    decimals: int = 2

    def measured(self, rows: Rows) -> float | None:
        """The answer; None where the result does not have it."""
        try:
            return self.read(rows)
        except (LookupError, TypeError, ZeroDivisionError):
            return None

    def is_met(self, value: float) -> bool:
        """Whether an answer is as good as asked."""
        return value >= self.asked and (self.most is None or value <= self.most)

    @property
    def words(self) -> str:
        """What is asked, as a table says it."""
        if self.most is None:
            return f"at least {self.asked:.{self.decimals}f}"
        return f"{self.asked:.{self.decimals}f} to {self.most:.{self.decimals}f}"

    def answer(self, rows: Rows) -> str:
        """What was measured, as a table says it."""
        value = self.measured(rows)
        if value is None:
            return "not measured"
        return f"{value:.{self.decimals}f}{'' if self.is_met(value) else ', missed'}"


def _ratio(field: str, above: str, below: str) -> Callable[[Rows], float]:
    return lambda rows: rows[above][field] / rows[below][field]


def _figure(row: str, field: str) -> Callable[[Rows], float]:
    return lambda rows: rows[row][field]


def _peak(row: str) -> Target:
    title = f"{row.upper()}, peak memory over the planner's"
    return Target(
        title, 0.9, lambda rows: rows[row]["peak_gib"] / rows[row]["predicted_gib"], most=1.1
    )


TARGETS = (
    Target("D, tokens a second over transformers'", 2.0, _ratio("tokens_per_s", "d", "transformers")),
    Target("D, MFU (0.50 is hoped for)", 0.45, _figure("d", "mfu")),
    Target("D, MFU over the text-only model's", 0.90, _ratio("mfu", "d", "text")),
    Target("D, share of the step in which the GPU is busy", 0.95, _figure("d", "busy")),
    Target("X, samples a second over D's", 1.76, _ratio("samples_per_s", "x", "d")),
    Target("H, samples a second over D's", 1.26, _ratio("samples_per_s", "h", "d")),
    Target("D, stage 1 over stage 2, samples a second", 1.3, _ratio("samples_per_s", "d_stage_1", "d")),
    Target("InternViT-300M, tiles a second", 690, _figure("encoder_300m", "tiles_per_s"), decimals=0),
    Target("InternViT-6B, tiles a second", 41, _figure("encoder_6b", "tiles_per_s"), decimals=1),
    _peak("d"),
    _peak("x"),
    _peak("h"),
)  # fmt: skip
"""1.76 and 1.26 are of NVLM 1.0, Table 3; half of a card's peak makes 690 and 41 tiles a second."""


def table(rows: Rows) -> str:
    """Markdown: each target, what is asked, what was measured."""
    lines = ["| target | asked | measured |", "| --- | --- | --- |"]
    lines += [f"| {each.title} | {each.words} | {each.answer(rows)} |" for each in TARGETS]
    return "\n".join(lines)
