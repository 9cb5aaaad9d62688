"""The wheel, built and installed elsewhere: its recipes, blends and scripts are found from any directory."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = (
    "nvlm_train",
    "recipes",
    "data_recipes",
    "launch",
    "setup.py",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)
CODE = """
import importlib.metadata, json, pathlib, nvlm_train
from nvlm_train.recipe.load import load_recipe
from nvlm_train.config.paths import find_data_recipe, launch_dir
assert (launch_dir() / "slurm.sbatch").is_file()
recipe = load_recipe(["experiment=smoke"])
print(json.dumps([nvlm_train.__file__, str(find_data_recipe("smoke")), recipe.model.tokenizer.path]))
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment or None,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_an_installed_wheel_finds_its_recipes(tmp_path: Path) -> None:
    source, elsewhere, site = tmp_path / "source", tmp_path / "elsewhere", tmp_path / "site"
    source.mkdir()
    elsewhere.mkdir()
    for name in SOURCES:
        path = ROOT / name
        ignored = shutil.ignore_patterns("__pycache__")
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=ignored)
        else:
            shutil.copy(path, source / name)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    run(*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, source, cwd=elsewhere)
    (wheel,) = tmp_path.glob("nvlm_train-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"nvlm_train/recipes/train.yaml", "nvlm_train/recipes/stage/d_sft.yaml"} <= names
    assert {"nvlm_train/data_recipes/smoke.yaml", "nvlm_train/py.typed"} <= names
    assert not any(
        name.startswith(("recipes/", "data_recipes/", "launch/", "tests/")) for name in names
    )
    run(*pip, "install", "--no-deps", "--target", site, wheel, cwd=elsewhere)
    shutil.rmtree(source)
    found = run(sys.executable, "-c", CODE, cwd=elsewhere, PYTHONPATH=str(site))
    assert found.count(str(site / "nvlm_train")) == 3
    assert list(elsewhere.iterdir()) == []
