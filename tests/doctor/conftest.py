"""Gives each test smoke data of its own, because these tests break it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nvlm_train.config.schema import Recipe
from tests.train.smoke import make_smoke_data, overrides, smoke_recipe


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes a tokenizer and shards, to copy."""
    root = tmp_path_factory.mktemp("doctor")
    make_smoke_data(root)
    return root


@pytest.fixture
def root(original: Path, tmp_path: Path) -> Path:
    """Makes a copy with a blend that names its shards."""
    copy = tmp_path / "data"
    shutil.copytree(original, copy)
    blend = copy / "blend.yaml"
    blend.write_text(blend.read_text().replace(str(original), str(copy)))
    return copy


@pytest.fixture
def recipe(root: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """Returns `recipe(*overrides)`, which loads the recipe on that data."""
    return lambda *more: smoke_recipe(root, tmp_path / "run", *more)


@pytest.fixture
def recipe_arguments(root: Path, tmp_path: Path) -> list[str]:
    """Returns the same recipe as arguments of `nvlm doctor`."""
    return overrides(root, tmp_path / "run")
