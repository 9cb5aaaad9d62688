"""Writes the drawings of docs/ as SVG: `python docs/drawings/draw.py`. tests/test_docs.py keeps them."""

from __future__ import annotations

import argparse
from pathlib import Path

import stacks
import step


def main() -> None:
    """Writes every drawing into --out, by default beside this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, metavar="DIR")
    out: Path = parser.parse_args().out
    for name, content in (("step.svg", step.draw()), ("stacks.svg", stacks.draw())):
        (out / name).write_bytes(content)


if __name__ == "__main__":
    main()
