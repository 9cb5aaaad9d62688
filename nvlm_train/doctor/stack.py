"""Lists in one table which versions fit together, and checks an installation against it.

`setup.py`, the constraints files, the Dockerfile and docs/install.md are tested against the table. The
rules take what is installed as data. `python -m nvlm_train.doctor.stack` checks the Python that runs it.
"""

from __future__ import annotations

import importlib.util
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from nvlm_train.doctor.finding import Finding, Findings, error, ok, warning


@dataclass(frozen=True)
class Range:
    """Names the versions of one distribution that nvlm-train works with."""

    name: str
    """Name in the package index; `python` is the interpreter."""
    versions: str
    """A PEP 440 specifier. Pre-releases inside it count: NVIDIA's images bring torch 2.10.0a0+..."""
    why: str
    remedy: str


RANGES: tuple[Range, ...] = (
    Range(
        "python", ">=3.11,<3.13", "3.11 is tested, 3.12 has run on a GPU", "use Python 3.11 or 3.12"
    ),
    Range(
        "torch",
        ">=2.10.0a0,<2.14",
        "run with 2.11 on a GPU and 2.13 on CPUs; 2.10 is what NVIDIA's images with a fitting "
        "Transformer Engine bring",
        "install a torch of that range first, with the CUDA of the machine's driver",
    ),
    Range(
        "megatron-core",
        ">=0.16.1,<0.17",
        "corrections in parallel/ and train/ replace functions of that release",
        "pip install 'megatron-core==0.16.1'",
    ),
    Range(
        "hydra-core", ">=1.3.2,<1.4", "recipes are composed with it", "pip install 'hydra-core<1.4'"
    ),
    Range("omegaconf", ">=2.2,<2.4", "hydra 1.3 states it", "pip install 'omegaconf>=2.3,<2.4'"),
    Range(
        "psutil",
        ">=5.9",
        "megatron-core's checkpoint writer hangs without it, and does not require it",
        "pip install psutil",
    ),
)
"""What has to be installed."""

TRANSFORMER_ENGINE = Range(
    "transformer-engine",
    ">=2.9,<2.12",
    "megatron-core 0.16.1 states it in its own extra `dev`",
    "pip install --no-build-isolation 'nvlm-train[gpu]' (CUDA 12: [gpu-cu12]), or remove it",
)
"""What may be installed."""

ENGINE_PARTS = ("transformer-engine-torch", "transformer-engine-cu12", "transformer-engine-cu13")
"""Distributions that pip installs beside `transformer-engine`, all of one version."""

MEGATRON_PARTS = (
    "dist_checkpointing", "distributed", "extensions", "fusions", "models", "optimizer", "pipeline_parallel",
    "tensor_parallel", "transformer",
)  # fmt: skip
"""Directories of megatron/core that nvlm-train imports from."""


@dataclass(frozen=True)
class Setup:
    """Holds one combination that fits together: a row in docs/install.md."""

    name: str
    python: str
    torch: str
    cuda: str
    megatron_core: str
    transformer_engine: str
    apex: str
    constraints: str
    tried: str


SETUPS: tuple[Setup, ...] = (
    Setup(
        "CPU", "3.11, 3.12", "2.13.0", "-", "0.16.1", "-", "-", "`constraints.txt`",
        "3.11: every test but those marked `gpu`; 3.12: the ranges admit it",
    ),
    Setup(
        "GPU, torch's wheels, CUDA 13", "3.12", "2.11.0", "13.0", "0.16.1", "2.11.0 (`[gpu]`), or none",
        "not needed", "`constraints-gpu.txt`",
        "smoke recipes of D, X and H on one H200, with Transformer Engine and without",
    ),
    Setup(
        "GPU, torch's wheels, CUDA 12", "3.11, 3.12", "2.10 to 2.13", "12.x", "0.16.1",
        "2.9 to 2.11 (`[gpu-cu12]`), or none", "not needed", "`constraints-gpu.txt`", "no",
    ),
    Setup(
        "`nvcr.io/nvidia/pytorch:25.12-py3`", "3.12", "2.10.0a0", "13.1", "0.16.1", "the image's",
        "the image's", "what the image has, then `constraints-gpu.txt`",
        "no; the build ends with this check of what the image has",
    ),
)  # fmt: skip


def setups_table() -> str:
    """Returns `SETUPS` as a Markdown table, for docs/install.md."""
    columns = {
        "setup": "name", "Python": "python", "torch": "torch", "CUDA": "cuda",
        "megatron-core": "megatron_core", "Transformer Engine": "transformer_engine", "apex": "apex",
        "constraints": "constraints", "tried": "tried",
    }  # fmt: skip
    cells = [[getattr(each, field) for field in columns.values()] for each in SETUPS]
    rows = [list(columns), ["---"] * len(columns), *cells]
    return "\n".join("|" + "|".join(f" {cell} " for cell in row) + "|" for row in rows)


def ranges_table() -> str:
    """Returns `RANGES` and Transformer Engine's range as a Markdown table, for docs/install.md."""
    rows = [f"| {each.name} | `{each.versions}` | {each.why} |" for each in RANGES]
    engine = TRANSFORMER_ENGINE
    rows.append(f"| {engine.name} (optional) | `{engine.versions}` | {engine.why} |")
    return "\n".join(["| what | versions | why |", "| --- | --- | --- |", *rows])


@dataclass(frozen=True)
class Installed:
    """Says what a Python has installed."""

    versions: Mapping[str, str]
    """Distribution -> version, without missing ones. `python` is the interpreter's version."""
    torch_cuda: str | None
    """CUDA version that torch was built for, such as `13.0`; None for a CPU build."""
    apex_is_nvidias: bool
    """True when the extension `amp_C` is installed, which only NVIDIA's apex has."""
    missing_parts: tuple[str, ...] = ()
    """Members of `MEGATRON_PARTS` that Python does not find."""
    engine_problem: str | None = None
    """Why `transformer_engine.pytorch` cannot be imported; None when it can."""


def check_stack(found: Installed) -> Findings:
    """Yields everything that does not fit, with its remedy; one `ok` when there is no error."""
    problems = [*_required(found), *_megatron(found), *_engine(found), *_apex(found)]
    yield from problems
    if not any(each.level == "error" for each in problems):
        yield ok("stack", "the versions fit together (docs/install.md)")


def _fits(each: Range, number: str) -> bool:
    try:
        return SpecifierSet(each.versions).contains(Version(number), prereleases=True)
    except InvalidVersion:
        return False


def _required(found: Installed) -> Findings:
    for each in RANGES:
        number = found.versions.get(each.name)
        if number is None:
            yield error("stack", f"{each.name} is not installed: {each.why}", each.remedy)
        elif not _fits(each, number):
            text = f"{each.name}={number} is not in {each.versions}: {each.why}"
            yield error("stack", text, each.remedy)


def _megatron(found: Installed) -> Findings:
    if found.missing_parts and "megatron-core" in found.versions:
        yield error(
            "stack",
            f"megatron-core={found.versions['megatron-core']} is registered, but the `megatron` that "
            f"Python finds lacks core/{', core/'.join(found.missing_parts)}",
            "take other folders named megatron out of PYTHONPATH, then "
            "pip install --force-reinstall --no-deps 'megatron-core==0.16.1'",
        )


def _engine(found: Installed) -> Findings:
    """Checks Transformer Engine. Problems are errors with CUDA; a CPU does not use it, so it only warns."""
    number = found.versions.get(TRANSFORMER_ENGINE.name)
    if number is None:
        return
    judge = error if found.torch_cuda else warning
    remedy = TRANSFORMER_ENGINE.remedy
    if not _fits(TRANSFORMER_ENGINE, number):
        text = f"{TRANSFORMER_ENGINE.name}={number} is not in {TRANSFORMER_ENGINE.versions}"
        yield judge("stack", f"{text}: {TRANSFORMER_ENGINE.why}", remedy)
    parts = {name: found.versions[name] for name in ENGINE_PARTS if name in found.versions}
    others = [f"{name}={part}" for name, part in parts.items() if _base(part) != _base(number)]
    if others:
        text = f"{TRANSFORMER_ENGINE.name}={number} beside {' '.join(others)}"
        yield judge("stack", f"{text}: its parts have to be of one version", remedy)
    cores = [name for name in ENGINE_PARTS[1:] if name in parts]
    major = (found.torch_cuda or "").partition(".")[0]
    wrong = [name for name in cores if major and name != f"transformer-engine-cu{major}"]
    if wrong:
        yield error(
            "stack",
            f"torch is built for CUDA {found.torch_cuda}, {wrong[0]} for another",
            f"pip uninstall {wrong[0]}, then {remedy}",
        )
    if found.engine_problem is not None:
        yield judge("stack", *_import_problem(found, _base(number)))


def _import_problem(found: Installed, number: str) -> tuple[str, str]:
    """Returns why Transformer Engine cannot be imported, and the remedy."""
    text = f"Transformer Engine cannot be imported ({found.engine_problem})"
    rebuild = (
        "build it again against this torch: pip install --force-reinstall --no-deps "
        f"--no-build-isolation --no-binary transformer-engine-torch 'transformer-engine-torch=={number}'"
    )
    if "undefined symbol" in (found.engine_problem or ""):
        torch = found.versions.get("torch")
        return f"{text}: it was built for another torch or CUDA than torch={torch}", rebuild
    return text, f"mend what it names (libcuda.so.1 is the driver's), or {rebuild}"


def _base(number: str) -> str:
    """Returns a version without its local part, which versions in NVIDIA's images have.

    >>> _base("2.10.0+769ed778")
    '2.10.0'
    """
    return number.partition("+")[0]


def _apex(found: Installed) -> Findings:
    if "apex" in found.versions and not found.apex_is_nvidias:
        yield error(
            "stack",
            f"apex={found.versions['apex']} is not NVIDIA's apex (it lacks amp_C), but a web toolkit of "
            "that name, or was built without its extensions; megatron-core imports it all the same",
            "pip uninstall apex; it is not needed, and NVIDIA's is built from its repository",
        )


def lacking() -> Findings:
    """Yields what has to be installed and is not. It looks at names only, and imports nothing."""
    found = _versions()
    for each in RANGES:
        if each.name not in found:
            yield error("stack", f"{each.name} is not installed: {each.why}", each.remedy)


def _versions() -> dict[str, str]:
    names = [each.name for each in (*RANGES[1:], TRANSFORMER_ENGINE)]
    versions = {"python": platform.python_version()}
    for name in (*names, *ENGINE_PARTS, "apex"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def here() -> Installed:
    """Returns what this Python has. Imports torch, and Transformer Engine if it is installed."""
    import torch

    from nvlm_train.parallel import kernels

    return Installed(
        versions=_versions(),
        torch_cuda=torch.version.cuda,
        apex_is_nvidias=kernels.has_amp(),
        missing_parts=_missing_parts(),
        engine_problem=kernels.engine_problem(),
    )


def _missing_parts() -> tuple[str, ...]:
    spec = importlib.util.find_spec("megatron")
    roots = [Path(place) for place in (spec and spec.submodule_search_locations) or ()]
    return tuple(
        part
        for part in MEGATRON_PARTS
        if not any((root / "core" / part).is_dir() for root in roots)
    )


def _line(each: Finding) -> str:
    remedy = f"; {each.remedy}" if each.remedy else ""
    return f"{each.level}: {each.text}{remedy}\n"


def main() -> int:
    """Prints what does not fit. Returns 1 when that is an error. The Dockerfile runs it as its last step."""
    findings = list(lacking()) or list(check_stack(here()))
    sys.stdout.writelines(_line(each) for each in findings)
    return int(any(each.level == "error" for each in findings))


if __name__ == "__main__":
    sys.exit(main())
