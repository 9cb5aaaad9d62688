"""The examples in docstrings are run."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import nvlm_train

PACKAGE = Path(nvlm_train.__file__).parent
SHOWING = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if ">>> " in path.read_text()
)


@pytest.mark.parametrize("name", SHOWING)
def test_docstrings_show_what_happens(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0 and result.failed == 0


def test_some_do() -> None:
    assert {"nvlm_train.tokens", "nvlm_train.routes", "nvlm_train.tiling"} <= set(SHOWING)
