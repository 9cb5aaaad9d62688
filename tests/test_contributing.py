"""Hooks before a commit run what `make lint` runs, and CONTRIBUTING states the caps that are tested."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from tests import test_floors

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def lint_lines() -> list[str]:
    """Commands of `make lint`, with the Makefile's variables in their places."""
    text = (ROOT / "Makefile").read_text()
    variables = dict(re.findall(r"^(\w+) := (.+)$", text, re.MULTILINE))
    (recipe,) = re.findall(r"^lint:.*\n((?:\t.*\n)+)", text, re.MULTILINE)
    for _ in variables:
        recipe = re.sub(r"\$\((\w+)\)", lambda match: variables[match[1]], recipe)
    return [line.strip() for line in recipe.splitlines()]


def test_hooks_run_the_lines_of_make_lint() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    assert [hook["entry"] for hook in repository["hooks"]] == lint_lines()
    assert ".venv/bin/ruff format --check" in lint_lines()
    for hook in repository["hooks"]:
        # Always, on the whole tree, with what is installed: as make does.
        assert hook["language"] == "system" and hook["always_run"] and not hook["pass_filenames"]


def test_the_page_states_the_caps_that_are_tested() -> None:
    assert f"at most {test_floors.WIDEST} Python files" in PAGE
    assert f"at most {test_floors.LONGEST} lines" in PAGE


def test_targets_of_make_that_the_page_names_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", PAGE, re.MULTILINE))
    assert {"install", "test", "lint"} <= named <= targets
