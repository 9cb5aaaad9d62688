"""The tables printed when a stage starts. Pure formatting: rows in, rich tables or text out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

WIDTH = 110
"""Columns of a table in a log, where no terminal says how wide it is."""


@dataclass(frozen=True)
class PartRow:
    """One module of the freeze table."""

    module: str
    parameters: int
    is_trainable: bool
    lr: float | None = None
    """Largest learning rate of the stage; none for a frozen part."""


@dataclass(frozen=True)
class NumberRow:
    """One derived number: what it is, its value as text, and the arithmetic behind it."""

    name: str
    value: str
    how: str


def freeze_table(stage: str, rows: Sequence[PartRow]) -> Table:
    """Which modules a stage trains, and which it leaves bitwise as they are."""
    table = Table(title=f"stage {stage}: what trains", title_justify="left")
    table.add_column("module")
    table.add_column("parameters", justify="right")
    table.add_column("state")
    table.add_column("lr", justify="right")
    for row in rows:
        rate = "-" if row.lr is None or not row.is_trainable else f"{row.lr:.2e}"
        state = "trainable" if row.is_trainable else "frozen"
        table.add_row(row.module, f"{row.parameters:,}", state, rate)
    total = sum(row.parameters for row in rows)
    trained = sum(row.parameters for row in rows if row.is_trainable)
    share = f"{100 * trained / total:.1f}% trainable" if total else "-"
    table.add_section()
    table.add_row("all", f"{total:,}", share, "")
    return table


def numbers_table(stage: str, rows: Sequence[NumberRow]) -> Table:
    """The numbers that follow from the recipe."""
    table = Table(title=f"stage {stage}: derived numbers", title_justify="left")
    table.add_column("number")
    table.add_column("value", justify="right")
    table.add_column("how computed")
    for row in rows:
        table.add_row(row.name, row.value, row.how)
    return table


def render(table: Table, width: int = WIDTH) -> str:
    """A table as plain text, for the log."""
    console = Console(width=width, no_color=True, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip("\n")


def format_bytes(number: float) -> str:
    """Bytes for people.

    >>> format_bytes(6.5 * 2**20)
    '6.5 MiB'
    """
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = 0
    while number >= 1024 and power < len(units) - 1:
        number, power = number / 1024, power + 1
    return f"{number:.1f} {units[power]}"
