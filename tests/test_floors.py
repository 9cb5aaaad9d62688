"""The architecture, kept by reading imports: downward only, and some packages in one file only.

A package whose docstring lists floors is a house: its rooms (files and packages in it) import rooms of
lower floors only. `nvlm_train` is one, and so are `data` and `train` in it.
"""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import nvlm_train

ROOT = Path(nvlm_train.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
HOUSES = ["nvlm_train", "nvlm_train.data", "nvlm_train.train"]
WIDEST = 14
"""Python files of a folder, at most."""
LONGEST = 400
"""Lines of a file, at most."""
ONLY_IN = {
    "hydra": "config/load.py",
    "omegaconf": "config/load.py",
    "wandb": "train/tracking/wandb_run.py",
    "wandb_workspaces": "train/tracking/dashboard.py",
    "transformer_engine": "parallel/kernels.py",
    "apex": "parallel/kernels.py",
}


def floors(house: str) -> dict[str, int]:
    """Returns room -> floor, as the package's docstring lists them."""
    found: dict[str, int] = {}
    for line in (importlib.import_module(house).__doc__ or "").splitlines():
        match = re.fullmatch(r"    (\d+)  ((?:\w+ )*\w+)  .*", line)
        if match:
            found |= dict.fromkeys(match[2].split(), int(match[1]))
    return found


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Yields dotted names that a file imports anywhere, also inside functions and out of packages."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            module = node.module or ""
            yield module, node.lineno
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)


def files_of(house: str) -> list[Path]:
    """Returns all files of a house except the one with its docstring."""
    folder = ROOT.parent / house.replace(".", "/")
    outside = (folder / "__init__.py", folder / "__main__.py")
    return [path for path in FILES if folder in path.parents and path not in outside]


def room(path: Path, house: str) -> str:
    folder = ROOT.parent / house.replace(".", "/")
    return path.relative_to(folder).parts[0].removesuffix(".py")


def upward(path: Path, house: str, known: dict[str, int]) -> Iterator[str]:
    """Returns imports of other rooms that do not point downward. Any room may import errors."""
    here = room(path, house)
    for name, line in imports(path):
        if not name.startswith(house + "."):
            continue
        there = name.removeprefix(house + ".").split(".")[0]
        if there in known and there not in (here, "errors") and known[there] >= known[here]:
            yield f"{path.relative_to(ROOT)}:{line} imports {name}"


@pytest.mark.parametrize("house", HOUSES)
def test_every_room_has_a_floor(house: str) -> None:
    rooms, listed = {room(path, house) for path in files_of(house)}, set(floors(house))
    assert rooms == listed, f"{house}/__init__.py: not listed or not there: {rooms ^ listed}"


def test_rooms_that_name_their_floor_are_on_it() -> None:
    for name, floor in floors("nvlm_train").items():
        stated = re.match(
            r"Floor (\d+):", importlib.import_module(f"nvlm_train.{name}").__doc__ or ""
        )
        assert stated is None or int(stated[1]) == floor, name


@pytest.mark.parametrize("house", HOUSES)
def test_imports_point_downward(house: str) -> None:
    known = floors(house)
    assert [each for path in files_of(house) for each in upward(path, house, known)] == []


@pytest.mark.parametrize(
    ("house", "file", "turned_over"),
    [
        ("nvlm_train", "model/build.py", {"model": 1, "parallel": 2}),
        ("nvlm_train.data", "plan/plan.py", {"plan": 1, "index": 1}),
    ],
)
def test_the_check_sees_an_import_that_points_upward(
    house: str, file: str, turned_over: dict[str, int]
) -> None:
    assert list(upward(ROOT.parent / house.replace(".", "/") / file, house, turned_over))


def test_no_folder_is_a_hall() -> None:
    folders = {path.parent for path in FILES}
    wide = {folder.name: len(list(folder.glob("*.py"))) for folder in folders}
    assert max(wide.values()) <= WIDEST, wide


def test_no_file_is_long() -> None:
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert max(lines.values()) <= LONGEST, lines


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
