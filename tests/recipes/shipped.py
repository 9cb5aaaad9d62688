"""The package's recipes of real sizes, as docs/reference/recipe_table.py reads them."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

from nvlm_train.config.paths import recipes_dir
from nvlm_train.config.schema import Recipe

SCRIPT = Path(__file__).parents[2] / "docs" / "reference" / "recipe_table.py"
NAMES = sorted(path.stem for path in (recipes_dir() / "experiment").glob("nvlm_*.yaml"))


def load_script() -> ModuleType:
    """Imports the script, which lies outside every package."""
    if SCRIPT.stem in sys.modules:
        return sys.modules[SCRIPT.stem]
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up there.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


table = load_script()


@cache
def load(name: str) -> Recipe:
    """Composes a recipe, once for all tests."""
    recipe: Recipe = table.Shipped.read(name).load()
    return recipe
