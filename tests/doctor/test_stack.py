"""Installations as data: what fits is said to fit, and what does not is named with its remedy."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import megatron
import pytest

import nvlm_train
from nvlm_train.doctor import stack
from nvlm_train.doctor.finding import Finding
from nvlm_train.doctor.stack import Installed, check_stack
from nvlm_train.parallel import kernels

CPU = Installed(
    versions={
        "python": "3.11.7", "torch": "2.13.0+cpu", "megatron-core": "0.16.1", "hydra-core": "1.3.8",
        "omegaconf": "2.3.1", "psutil": "7.2.2",
    },
    torch_cuda=None,
    apex_is_nvidias=False,
)  # fmt: skip
ENGINE = {
    "transformer-engine": "2.11.0", "transformer-engine-torch": "2.11.0", "transformer-engine-cu13": "2.11.0",
}  # fmt: skip


def having(found: Installed, **versions: str) -> Installed:
    """Returns the installation with other versions; `_` stands for `-`."""
    named = {name.replace("_", "-"): number for name, number in versions.items()}
    return replace(found, versions={**found.versions, **named})


def without(found: Installed, name: str) -> Installed:
    kept = {each: number for each, number in found.versions.items() if each != name}
    return replace(found, versions=kept)


GPU = replace(having(CPU, torch="2.11.0+cu130", python="3.12.3"), torch_cuda="13.0")
GPU_ENGINE = replace(GPU, versions={**GPU.versions, **ENGINE})
NVIDIA = replace(
    having(
        GPU, torch="2.10.0a0+b4e4ee81d3.nv25.12", transformer_engine="2.10.0+769ed778", apex="0.1"
    ),
    torch_cuda="13.1",
    apex_is_nvidias=True,
)
GPU_CU12 = replace(
    having(
        GPU, torch="2.12.1+cu128", transformer_engine="2.9.0", transformer_engine_torch="2.9.0",
        transformer_engine_cu12="2.9.0",
    ),
    torch_cuda="12.8",
)  # fmt: skip


@pytest.mark.parametrize("found", [CPU, GPU, GPU_ENGINE, NVIDIA, GPU_CU12])
def test_what_fits(found: Installed) -> None:
    assert [each.level for each in check_stack(found)] == ["ok"]


WRONG: dict[str, tuple[Installed, str, str]] = {
    "torch too old": (having(CPU, torch="2.9.1"), "torch=2.9.1 is not in", "install a torch"),
    "torch of an older image": (
        having(NVIDIA, torch="2.9.0a0+50eac811a6.nv25.09"), "torch=2.9.0a0", "install a torch",
    ),
    "torch too new": (having(GPU, torch="2.14.0+cu130"), "torch=2.14.0+cu130 is not in", "torch"),
    "torch's next development build": (having(GPU, torch="2.14.0a0+abc"), "torch=2.14.0a0", "torch"),
    "no version at all": (having(GPU, torch="unknown"), "torch=unknown is not in", "torch"),
    "Python": (having(CPU, python="3.13.1"), "python=3.13.1 is not in >=3.11,<3.13", "3.11 or 3.12"),
    "older Python": (having(CPU, python="3.10.12"), "python=3.10.12", "3.11 or 3.12"),
    "megatron-core too new": (having(CPU, megatron_core="0.17.0"), "megatron-core=0.17.0", "0.16.1"),
    "megatron-core too old": (having(CPU, megatron_core="0.15.3"), "megatron-core=0.15.3", "0.16.1"),
    "megatron-core missing": (
        without(CPU, "megatron-core"), "megatron-core is not installed", "0.16.1",
    ),
    "megatron-core in parts": (
        replace(CPU, missing_parts=("optimizer", "models")), "lacks core/optimizer, core/models",
        "PYTHONPATH",
    ),
    "hydra": (having(CPU, hydra_core="1.4.0"), "hydra-core=1.4.0", "hydra-core<1.4"),
    "omegaconf": (having(CPU, omegaconf="2.4.0"), "omegaconf=2.4.0 is not in >=2.2,<2.4", "<2.4"),
    "no psutil": (without(CPU, "psutil"), "psutil is not installed", "pip install psutil"),
    "Transformer Engine too new": (
        having(GPU, transformer_engine="2.12.0"), "transformer-engine=2.12.0 is not in >=2.9,<2.12",
        "gpu-cu12",
    ),
    "of a too new image": (
        having(NVIDIA, transformer_engine="2.12.0+5671fd36"), "transformer-engine=2.12.0+5671fd36",
        "remove it",
    ),
    "Transformer Engine too old": (
        having(GPU, transformer_engine="2.4.0"), "transformer-engine=2.4.0", "nvlm-train[gpu]",
    ),
    "mixed parts": (
        having(GPU_ENGINE, transformer_engine_torch="2.9.0"), "beside transformer-engine-torch=2.9.0",
        "nvlm-train[gpu]",
    ),
    "core for another CUDA": (
        replace(GPU_ENGINE, torch_cuda="12.8"), "built for CUDA 12.8, transformer-engine-cu13",
        "pip uninstall transformer-engine-cu13",
    ),
    "no driver": (
        replace(GPU_ENGINE, engine_problem="libcuda.so.1: cannot open shared object file"),
        "cannot be imported (libcuda.so.1: cannot open shared object file)", "driver",
    ),
    "two core libraries": (
        having(GPU_ENGINE, transformer_engine_cu12="2.11.0"),
        "torch is built for CUDA 13.0, transformer-engine-cu12 for another",
        "pip uninstall transformer-engine-cu12",
    ),
    "built for another torch": (
        replace(GPU_ENGINE, engine_problem="undefined symbol: _ZN3c106"),
        "undefined symbol: _ZN3c106", "--no-build-isolation",
    ),
    "the other apex": (having(GPU, apex="0.9.10.dev0"), "apex=0.9.10.dev0 is not NVIDIA's", "uninstall"),
    "the other apex on a CPU": (having(CPU, apex="0.9.10.dev0"), "not NVIDIA's", "uninstall"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit(name: str) -> None:
    found, text, remedy = WRONG[name]
    (problem,) = check_stack(found)
    assert problem.level == "error"
    assert text in problem.text and remedy in problem.remedy


def test_all_problems_at_once() -> None:
    found = having(CPU, torch="2.5.0", omegaconf="2.4.0", apex="0.9", python="3.14.0")
    assert [each.level for each in check_stack(found)] == ["error"] * 4


def test_a_cpu_does_not_use_transformer_engine() -> None:
    found: list[Finding] = list(check_stack(having(CPU, transformer_engine="2.14.0")))
    assert [each.level for each in found] == ["warning", "ok"]


def test_this_python_fits() -> None:
    """In a Python that does not fit, the other tests would prove nothing."""
    assert [each.level for each in check_stack(stack.here())] == ["ok"]
    assert stack.main() == 0


def test_parts_of_megatron_core_are_those_that_are_imported() -> None:
    assert stack.here().missing_parts == ()
    imports, package = re.compile(r"megatron\.core\.([a-z_]+)"), Path(nvlm_train.__path__[0])
    used = {name for path in package.rglob("*.py") for name in imports.findall(path.read_text())}
    (core,) = (Path(place) / "core" for place in megatron.__path__)
    assert set(stack.MEGATRON_PARTS) == {name for name in used if (core / name).is_dir()}


def test_parts_of_several_versions_are_named_though_the_import_asserts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformer Engine asserts at import. A package in its place asserts too, so no GPU is needed."""
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "pytorch.py").write_text("assert False, 'package version mismatch'")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert kernels.engine_problem() == "package version mismatch"
    finally:
        sys.modules.pop("transformer_engine", None)


WITHOUT = """
import importlib.abc, importlib.metadata, sys
class Gone(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == sys.argv[1]:
            raise ModuleNotFoundError(name)
known = importlib.metadata.version
def version(name):
    if name == sys.argv[2]:
        raise importlib.metadata.PackageNotFoundError(name)
    return known(name)
sys.meta_path.insert(0, Gone())
importlib.metadata.version = version
from nvlm_train.cli import main
sys.exit(main(["doctor", "experiment=smoke"]))
"""


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("psutil", "psutil"),
        ("torch", "torch"),
        pytest.param("hydra", "hydra-core", marks=pytest.mark.slow),
        pytest.param("omegaconf", "omegaconf", marks=pytest.mark.slow),
        pytest.param("megatron", "megatron-core", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_the_command_names_what_is_not_installed(module: str, name: str) -> None:
    command = [sys.executable, "-c", WITHOUT, module, name]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith(f"error: {name} is not installed: "), done.stdout + done.stderr
