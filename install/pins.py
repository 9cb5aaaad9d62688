"""pip's constraints where torch is there already. Needs nothing but Python.

python install/pins.py gpu > constraints-gpu.txt    # after a change of constraints.txt
python install/pins.py here > here.txt              # for this Python, whose torch stays as it is
pip install -c here.txt .
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).parent.parent
BROUGHT = frozenset({
    "torch", "filelock", "fsspec", "jinja2", "markupsafe", "mpmath", "networkx", "setuptools", "sympy",
    "typing-extensions",
})  # fmt: skip
"""torch and what it requires: a build of torch, or an image, has its own versions of them."""
BROUGHT_PREFIXES = ("nvidia-", "cuda-", "triton", "pytorch-triton")
"""Of what a build of torch for CUDA requires besides."""
ENGINE = {f"transformer-engine{part}": "2.11.0" for part in ("", "-cu12", "-cu13", "-torch")}
"""Transformer Engine and its parts, which only GPUs use."""
HEAD = """\
# For machines with a GPU, where torch is installed before (docs/install.md). Written by
# `python install/pins.py gpu`: constraints.txt without torch and what torch brings, and the parts of
# Transformer Engine."""


def normal(name: str) -> str:
    """A distribution's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def is_brought(name: str) -> bool:
    """Whether a build of torch has a version of its own of a distribution, given its normal name."""
    return name in BROUGHT or name.startswith(BROUGHT_PREFIXES)


def read_pins(text: str) -> dict[str, str]:
    """Normal name -> version, of a constraints file."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    pairs = (line.split("==") for line in lines if line)
    return {normal(name): number for name, number in pairs}


def gpu_pins(pins: Mapping[str, str]) -> dict[str, str]:
    """constraints-gpu.txt, from constraints.txt."""
    kept = {name: number for name, number in pins.items() if name not in BROUGHT}
    return dict(sorted((kept | ENGINE).items()))


def pins_beside(pins: Mapping[str, str], installed: Mapping[str, str]) -> dict[str, str]:
    """What torch and Transformer Engine consist of as it is installed, and pins of what is missing.

    Other distributions that are there have no line: pip keeps those that are new enough.
    """
    kept = {name: installed[name] for name in installed if is_brought(name) or name in ENGINE}
    missing = {name: number for name, number in pins.items() if name not in installed}
    return dict(sorted((missing | kept).items()))


def installed_here() -> dict[str, str]:
    """Normal name -> version, of this Python."""
    found = ((each.metadata["Name"], each.version) for each in distributions())
    return {normal(name): number for name, number in found if name}


def written(pins: Mapping[str, str]) -> str:
    """As a constraints file."""
    return "".join(f"{name}=={number}\n" for name, number in pins.items())


def main(what: str) -> str:
    """The file that is asked for: `gpu` or `here`."""
    if what == "gpu":
        pins = read_pins((ROOT / "constraints.txt").read_text())
        return HEAD + "\n" + written(gpu_pins(pins))
    if what == "here":
        pins = read_pins((ROOT / "constraints-gpu.txt").read_text())
        return written(pins_beside(pins, installed_here()))
    raise SystemExit(f"{what}: gpu or here is wanted")


if __name__ == "__main__":
    sys.stdout.write(main(*sys.argv[1:]))
