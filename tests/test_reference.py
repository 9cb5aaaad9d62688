"""docs/reference: the pages are what the code says, and every field that they show is described."""

from __future__ import annotations

import doctest
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import pytest

from nvlm_train.config import schema

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "docs" / "reference" / "generate.py"
VERBS = frozenset({
    "accepts", "add", "adds", "allows", "are", "asks", "becomes", "belongs", "bounds", "chooses",
    "comes", "compare", "compares", "computes", "counts", "cuts", "decay", "decodes", "describes",
    "divides", "draws", "drop", "encoded", "ends", "equals", "fall", "falls", "follow", "follows",
    "get", "gets", "give", "gives", "goes", "grows", "has", "have", "hold", "holds", "is", "keeps",
    "lasts", "leads", "leaves", "lets", "lie", "lies", "limits", "make", "makes", "marks", "means",
    "measures", "multiplies", "must", "names", "needs", "normalises", "normalizes", "raises",
    "reaches", "reads", "refers", "remain", "replaces", "rises", "rotates", "run", "runs", "saw",
    "says", "scales", "sees", "selects", "sends", "sets", "share", "shares", "shows", "slows",
    "spares", "splits", "start", "starts", "stay", "stays", "stops", "stores", "take", "takes",
    "told", "took", "train", "trained", "trains", "turn", "turns", "uses", "waited", "was", "were",
    "works", "writes",
})  # fmt: skip
"""Verbs of descriptions. A new sentence whose verb is not here adds it; a fragment has none to add."""
NAMES_IN_LOWER_CASE = ("wandb", "metrics.jsonl")


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_reference", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up there.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


generate = load_generator()
GROUPS = list(generate.groups(generate.Group("", schema.Recipe)))
CLASSES = [
    *((generate.file_of(each.cls), each.cls.__name__) for each in GROUPS),
    *((file, name) for file, name, _ in generate.METRICS),
]  # fmt: skip


def hints(name: str) -> dict[str, Any]:
    """Types of the fields of a class of the schema; none for other classes."""
    known = {each.cls.__name__: each.cls for each in GROUPS}
    return get_type_hints(known[name]) if name in known else {}


def is_sentence(text: str) -> bool:
    """Begins as a sentence does, ends with a full stop, and its first sentence has a verb that is known."""
    first = text.partition(". ")[0]
    begins = text[:1].isupper() or text.startswith(("`", *NAMES_IN_LOWER_CASE))
    return begins and text.endswith(".") and bool(VERBS & set(re.findall(r"[a-z]+", first)))


@pytest.mark.parametrize("file", generate.PAGES)
def test_pages_are_what_the_code_says(file: str) -> None:
    kept = (SCRIPT.parent / file).read_text(encoding="utf-8")
    assert kept == generate.PAGES[file](), f"run: {generate.COMMAND}"


@pytest.mark.parametrize(("file", "name"), CLASSES)
def test_every_field_is_described_by_a_sentence(file: str, name: str) -> None:
    said = generate.read_class(generate.PACKAGE / file, name)
    assert is_sentence(said.lead), f"{name}: {said.lead}: no sentence"
    for field, annotation in said.annotations.items():
        if field not in said.fields:
            assert generate.is_group(hints(name).get(field)), (
                f"{name}.{field} has no docstring under it"
            )
            continue
        description = said.fields[field]
        assert is_sentence(description.text), f"{name}.{field}: {description.text}: no sentence"
        if re.search(r"\b(int|float)\b", annotation):
            assert description.unit, f"{name}.{field} is a number: end its docstring with [unit]"


@pytest.mark.parametrize(
    "fragment",
    ["Edge of a square tile in pixels.", "the edge is square.", "A tile has an edge", "Those of its MLP."],
)  # fmt: skip
def test_a_fragment_is_no_sentence(fragment: str) -> None:
    assert not is_sentence(fragment)


def test_the_recipe_page_has_every_group_and_field() -> None:
    page = generate.recipe_page()
    for field in (
        "run_dir",
        "stages.NAME.optimizer.lr",
        "model.cross_attention.every",
        "health.spike",
    ):
        assert page.count(f"| `{field}` |") == 1  # fmt: skip
    assert (
        "| `stages.NAME.tiling.tags` | `none` \\| `1d` \\| `2d_grid` \\| `2d_bbox` | `1d` |" in page
    )
    assert "| `stages.NAME.steps` | whole number | required | steps |" in page


def test_links_between_sections_lead_somewhere() -> None:
    page = generate.recipe_page()
    headings = {generate.anchor(each) for each in re.findall(r"^## (.+)$", page, re.MULTILINE)}
    links = set(re.findall(r"\(#([^)]+)\)", page))
    assert links and links <= headings


def test_the_generator_imports_no_torch() -> None:
    code = f"import runpy, sys; runpy.run_path({str(SCRIPT)!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_units_are_read_from_the_end_of_docstrings() -> None:
    assert doctest.testmod(generate).failed == 0
