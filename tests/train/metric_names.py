"""Names of the fields of metrics.jsonl as docs/reference/metrics.md has them, to compare runs with."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "metrics.md"
SOURCES = ("captions", "vqa", "text")
"""Sources of the smoke data."""


def documented(section: str) -> set[str]:
    """Names in one table of the page, with the smoke data's sources for SOURCE."""
    _, found, rest = PAGE.read_text(encoding="utf-8").partition(f"\n## {section}\n")
    assert found, section
    table = rest.partition("\n## ")[0]
    names = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    return {name.replace("SOURCE", source) for name in names for source in SOURCES}


def records(run_dir: Path) -> list[dict[str, Any]]:
    """All lines of a run, whole."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
