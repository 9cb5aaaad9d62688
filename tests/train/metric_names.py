"""Names of the fields of metrics.jsonl as docs/reference/metrics.md has them, to compare runs with."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "metrics.md"
SOURCES = ("captions", "vqa", "text")
"""Sources of the smoke data."""


PARTS = ("encode", "layers", "output")
"""Parts of a step that have FLOPs."""


def documented(section: str) -> set[str]:
    """Names in one table of the page, with the smoke data's sources for SOURCE and parts for PART."""
    _, found, rest = PAGE.read_text(encoding="utf-8").partition(f"\n## {section}\n")
    assert found, section
    table = rest.partition("\n## ")[0]
    names = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    return {
        name.replace("SOURCE", source).replace("PART", part)
        for name in names
        for source in SOURCES
        for part in PARTS
    }


def every_step() -> set[str]:
    """Names that each line has."""
    return documented("StepRecord") | documented("PartSeconds")


def where_there_is_one() -> set[str]:
    """Names that a line has of each source that was trained on, and of each part that was computed."""
    return documented("SourceRecord") | documented("PartSpeed")


def records(run_dir: Path) -> list[dict[str, Any]]:
    """All lines of a run, whole."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
