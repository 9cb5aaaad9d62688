"""The architecture, kept by reading imports: downward only, and some packages in one file only."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import nvlm_train

ROOT = Path(nvlm_train.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
ONLY_IN = {
    "hydra": "config/load.py",
    "omegaconf": "config/load.py",
    "wandb": "train/tracking/wandb_run.py",
    "wandb_workspaces": "train/tracking/dashboard.py",
    "transformer_engine": "parallel/kernels.py",
    "apex": "parallel/kernels.py",
}


def floors() -> dict[str, int]:
    """Room to floor, as the package's docstring lists them."""
    found: dict[str, int] = {}
    for line in (nvlm_train.__doc__ or "").splitlines():
        match = re.fullmatch(r"    (\d+)  ((?:\w+ )*\w+)  .*", line)
        if match:
            found |= dict.fromkeys(match[2].split(), int(match[1]))
    return found


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Dotted names a file imports anywhere, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            module = node.module or ""
            yield module, node.lineno
            if module == "nvlm_train":
                yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)


def room(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return relative.parts[0].removesuffix(".py")


def upward(path: Path, known: dict[str, int]) -> Iterator[str]:
    """Imports that do not point downward. Errors are for everybody."""
    here = room(path)
    for name, line in imports(path):
        parts = name.split(".")
        if parts[0] != "nvlm_train" or len(parts) < 2:
            continue
        there = parts[1]
        if there in known and there not in (here, "errors") and known[there] >= known[here]:
            yield f"{path.relative_to(ROOT)}:{line} imports {name}"


def test_every_room_has_a_floor() -> None:
    rooms = {room(path) for path in FILES} - {"__init__", "__main__"}
    assert rooms <= set(floors()), f"not in nvlm_train/__init__.py: {rooms - set(floors())}"


def test_imports_point_downward() -> None:
    known = floors()
    inside = [path for path in FILES if room(path) in known]
    assert [each for path in inside for each in upward(path, known)] == []


def test_the_check_sees_an_import_that_points_upward() -> None:
    turned_over = {"model": 1, "parallel": 2}
    assert list(upward(ROOT / "model" / "build.py", turned_over))


@pytest.mark.parametrize(("package", "home"), ONLY_IN.items())
def test_a_package_is_imported_in_one_file(package: str, home: str) -> None:
    found = {
        path.relative_to(ROOT).as_posix()
        for path in FILES
        for name, _ in imports(path)
        if name.split(".")[0] == package
    }
    assert found <= {home}


def test_no_names_that_say_nothing() -> None:
    for path in FILES:
        assert path.stem not in ("utils", "util", "helpers", "helper", "misc", "common"), path
