"""The tables of docs/recipes.md are what the recipes say, and each recipe's command starts it."""

from __future__ import annotations

import doctest
import shlex

import pytest

from nvlm_train.config import rules
from nvlm_train.config.paths import recipes_dir
from tests.recipes.shipped import NAMES, load, table

PAGE = table.PAGE.read_text(encoding="utf-8")
LINES = PAGE.split(table.BEGIN)[1].split(table.END)[0].strip().splitlines()


@pytest.mark.parametrize("name", table.RECIPES)
def test_a_row_is_current(name: str) -> None:
    """After a change: python docs/reference/recipe_table.py."""
    assert table.row(name) in LINES


@pytest.mark.parametrize("name", table.PAPERS_LAYOUT)
def test_a_row_of_the_papers_layout_is_current(name: str) -> None:
    assert table.papers_row(name) in LINES


def test_the_tables_have_these_rows_and_no_others() -> None:
    first = [line.split("|")[1].strip() for line in LINES if line]
    papers = [f"`{name}`, SFT as in Table 11" for name in table.PAPERS_LAYOUT]
    recipes = [f"`{name}`" for name in table.RECIPES]
    names = table.ablations()
    assert first == [
        "recipe", "---", *recipes, *papers, "ablation", "---", *(f"`{name}`" for name in names)
    ]  # fmt: skip
    assert [line.split("|")[2].strip() for line in LINES[-len(names) :]] == [
        table.Shipped.read(name).about for name in names
    ]


def test_tables_are_put_between_the_marks_only() -> None:
    page = f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n"
    assert table.replaced(page, "new") == page.replace("old", "new")
    result = doctest.testmod(table)
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_command_starts_its_recipe_on_ranks_that_fit(name: str) -> None:
    """The second line names what nobody ships, and starts whole model replicas in every stage."""
    lines = (recipes_dir() / "experiment" / f"{name}.yaml").read_text().splitlines()
    words = shlex.split(lines[1].removeprefix("# "))
    assert f"experiment={name}" in words
    named = {word.partition("=")[0] for word in words if word.endswith("=DIR")}
    assert {"model.language.from", "model.vision.from"} <= named
    assert any(word.startswith("loader.data_root=") for word in words)
    shipped = table.Shipped.read(name)
    recipe = load(name)
    rules.check(recipe, shipped.world_size)
    assert recipe.model.language.weights is None and recipe.model.vision.weights is None
