"""Where recipes and data recipes lie: beside the package in a checkout, inside it in a wheel."""

from __future__ import annotations

from pathlib import Path

from nvlm_train.errors import ConfigError

PACKAGE = Path(__file__).resolve().parent.parent
"""The installed `nvlm_train` directory."""

SCHEME = "package://"
"""Prefix of paths that lie inside the installed package, such as the demo's backbones."""


def recipes_dir() -> Path:
    """Directory of the recipes that come with the package.

    Raises:
        ConfigError: the installation is incomplete.
    """
    return _shipped("recipes")


def data_recipes_dir() -> Path:
    """Directory of the blends that come with the package.

    Raises:
        ConfigError: the installation is incomplete.
    """
    return _shipped("data_recipes")


def launch_dir() -> Path:
    """Directory of the launch scripts that come with the package.

    Raises:
        ConfigError: the installation is incomplete.
    """
    return _shipped("launch")


def batch_script() -> Path:
    """The SLURM script among them. Raises ConfigError, as `launch_dir`."""
    return launch_dir() / "slurm.sbatch"


def find_data_recipe(name: str) -> Path:
    """The file of a blend: a shipped name without .yaml, or a path to one's own file.

    Raises:
        ConfigError: neither exists; lists the names that do.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(resolve_path(name))
        if path.is_file():
            return path
        raise ConfigError([f"blend={name}: no such file; give a path to a data recipe"])
    directory = data_recipes_dir()
    path = directory / f"{name}.yaml"
    if path.is_file():
        return path
    known = ", ".join(sorted(each.stem for each in directory.glob("*.yaml")))
    raise ConfigError(
        [f"blend={name}: no such data recipe; use one of {known}, or a path to a .yaml file"]
    )


def resolve_path(path: str) -> str:
    """`package://demo/assets` to the installed directory; every other path unchanged."""
    return str(PACKAGE / path.removeprefix(SCHEME)) if path.startswith(SCHEME) else path


def _shipped(name: str) -> Path:
    for parent in (PACKAGE, PACKAGE.parent):
        if (parent / name).is_dir():
            return parent / name
    raise ConfigError([f"{name}: not found beside or inside {PACKAGE}; install nvlm-train again"])
