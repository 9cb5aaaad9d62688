"""setup.py, constraints, Makefile, Dockerfile and docs/install.md say one thing; torch is left alone."""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
import venv
from importlib.metadata import requires, version
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

from nvlm_train.doctor import stack

ROOT = Path(__file__).parent.parent
SETUP = ast.parse((ROOT / "setup.py").read_text())


def load_pins() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pins", ROOT / "install" / "pins.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pins = load_pins()


def assigned(name: str) -> object:
    """Returns a literal of setup.py."""
    (found,) = (
        each.value
        for each in SETUP.body
        if isinstance(each, ast.Assign) and getattr(each.targets[0], "id", None) == name
    )
    return ast.literal_eval(found)


REQUIRED = [Requirement(line) for line in assigned("REQUIRED")]  # type: ignore[attr-defined]
EXTRAS: dict[str, list[str]] = assigned("EXTRAS")  # type: ignore[assignment]
PINNED = pins.read_pins((ROOT / "constraints.txt").read_text())


def test_ranges_are_the_stacks() -> None:
    required = {pins.normal(each.name): each.specifier for each in REQUIRED}
    for each in stack.RANGES[1:]:
        assert required[each.name] == Requirement(f"{each.name}{each.versions}").specifier
    python = re.search(r'python_requires="(.+)"', (ROOT / "setup.py").read_text())
    assert python is not None and python[1] == stack.RANGES[0].versions
    for extra, core in (("gpu", "core_cu13"), ("gpu-cu12", "core_cu12")):
        (line,) = EXTRAS[extra]
        engine = Requirement(line)
        assert engine.extras == {core, "pytorch"}
        assert engine.specifier == Requirement(f"x{stack.TRANSFORMER_ENGINE.versions}").specifier


def test_every_requirement_is_pinned_within_its_range() -> None:
    lines = [*REQUIRED, *(Requirement(line) for extra in EXTRAS.values() for line in extra)]
    for each in lines:
        number = (PINNED | pins.ENGINE)[pins.normal(each.name)]
        assert each.specifier.contains(number), f"{each} and {number}"


def test_the_gpus_constraints_are_made_from_the_others() -> None:
    text = (ROOT / "constraints-gpu.txt").read_text()
    assert text == pins.main("gpu"), "run: python install/pins.py gpu > constraints-gpu.txt"
    found = pins.read_pins(text)
    assert not pins.BROUGHT & found.keys() and found["megatron-core"] == PINNED["megatron-core"]


def test_what_torch_brings() -> None:
    closure, waiting = {"torch"}, ["torch"]
    while waiting:
        for line in requires(waiting.pop()) or []:
            each = Requirement(line)
            if each.marker is None or each.marker.evaluate({"extra": ""}):
                name = pins.normal(each.name)
                waiting += [name] if name not in closure else []
                closure.add(name)
    assert all(pins.is_brought(name) for name in closure)


def test_what_a_torch_for_cuda_brings() -> None:
    """These are the requirements of torch's wheels for CUDA 13. Their versions must stay."""
    brought = {
        "nvidia-cublas": "13.1.0", "cuda-bindings": "13.0.3", "triton": "3.6.0", "torch": "2.11.0+cu130"
    }  # fmt: skip
    assert pins.pins_beside({"rich": "15.0.0"}, brought) == brought | {"rich": "15.0.0"}


def test_what_is_installed_is_kept() -> None:
    found = pins.pins_beside(
        {"isal": "1.9.1", "numpy": "2.4.6", "transformer-engine": "2.11.0"},
        {"torch": "2.10.0a0+b4e4.nv25.12", "numpy": "1.26.4", "transformer-engine": "2.10.0+769e",
         "python-apt": "2.7.7+ubuntu5", "sympy": "1.14.0"},
    )  # fmt: skip
    assert found == {
        "isal": "1.9.1", "sympy": "1.14.0", "torch": "2.10.0a0+b4e4.nv25.12",
        "transformer-engine": "2.10.0+769e",
    }  # fmt: skip
    assert pins.main("here").count(f"torch=={version('torch')}\n") == 1


@pytest.mark.parametrize("name", ["Dockerfile", "Makefile"])
def test_no_list_is_kept_twice(name: str) -> None:
    """They name no version and no requirement but torch; what they copy exists."""
    text = (ROOT / name).read_text()
    commands = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    assert "==" not in commands.replace("(3, 11)", "")
    names = {pins.normal(each.name) for each in REQUIRED} - {"torch"}
    assert not names & set(re.findall(r"[a-zA-Z0-9_.-]+", commands))
    for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        assert all((ROOT / each).exists() for each in line.split())


def test_the_image_is_the_tables() -> None:
    base = re.search(r"^ARG BASE=(\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert base is not None and any(base[1] in each.name for each in stack.SETUPS)


def test_the_page_has_the_tables() -> None:
    page = (ROOT / "docs" / "install.md").read_text()
    assert stack.setups_table() in page and stack.ranges_table() in page
    for each in stack.SETUPS:
        for name in re.findall(r"`(constraints\S*)`", each.constraints):
            assert (ROOT / name).is_file()


def docker_commands() -> list[str]:
    """Returns the commands that the Dockerfile runs where torch is installed."""
    run = re.search(
        r"2>/dev/null; then \\\n(.+?) ; \\\n\s+else", (ROOT / "Dockerfile").read_text(), re.DOTALL
    )
    assert run is not None
    return [each.strip() for each in run[1].replace("\\\n", " ").split("&&")]


def test_the_dockerfile_checks_what_it_built() -> None:
    write, install, check = docker_commands()
    assert write == "python install/pins.py here > /tmp/here.txt"
    assert install == "pip install -c /tmp/here.txt ."
    assert check == "python -m nvlm_train.doctor.stack"


def python_with_torch(place: Path, number: str) -> Path:
    """Makes a Python in which a torch of this version is registered, and nothing else is installed."""
    venv.create(place, with_pip=True)
    (site,) = place.glob("lib/python*/site-packages")
    info = site / f"torch-{number}.dist-info"
    info.mkdir()
    needs = "".join(
        f"Requires-Dist: {each}\n" for each in ("filelock", "sympy", "jinja2", "fsspec")
    )
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: torch\nVersion: {number}\n{needs}"
    )
    (info / "INSTALLER").write_text("pip\n")
    (info / "RECORD").write_text("")
    return place / "bin"


def dry_run(tmp_path: Path, number: str, *extra: str) -> subprocess.CompletedProcess[str]:
    """Runs the Dockerfile's first two commands, the second one as a dry run."""
    bin_dir, source = python_with_torch(tmp_path / "python", number), tmp_path / "source"
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", "build", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=ignored)
    write, install, _ = docker_commands()
    here = tmp_path / "here.txt"
    commands = f"{write} && {install.replace('install', 'install --dry-run', 1)}"
    commands = commands.replace("/tmp/here.txt", str(here)).replace(" && pip", f" && {bin_dir}/pip")
    done = subprocess.run(
        ["bash", "-c", commands.replace("python ", f"{bin_dir}/python ", 1)],
        cwd=source, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert f"torch=={number}\n" in here.read_text()
    return done


@pytest.mark.slow
@pytest.mark.parametrize("number", ["2.11.0+cu130", "2.10.0a0+b4e4ee81d3.nv25.12"])
def test_pip_leaves_a_fitting_torch_alone(tmp_path: Path, number: str) -> None:
    done = dry_run(tmp_path, number)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("Would install"))
    names = {pins.normal(each.rsplit("-", 1)[0]) for each in line.split()[2:]}
    assert "torch" not in names
    assert {"nvlm-train", *(pins.normal(each.name) for each in REQUIRED)} - {"torch"} <= names


@pytest.mark.slow
def test_pip_refuses_another_torch_and_does_not_replace_it(tmp_path: Path) -> None:
    done = dry_run(tmp_path, "2.9.0a0+50eac811a6.nv25.09")
    assert done.returncode != 0 and "Would install" not in done.stdout
    assert "conflicting dependencies" in done.stderr and "torch" in done.stderr


def test_the_check_runs_by_itself() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nvlm_train.doctor.stack"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and done.stdout.startswith("ok: ")
