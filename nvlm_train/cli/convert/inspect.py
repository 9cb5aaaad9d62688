"""`nvlm convert inspect`: what a directory of weights is, what of it fits, and why the rest does not."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command with its arguments."""
    command = commands.add_parser(
        "inspect",
        help="say what a directory of weights is, and whether it fits",
        description="Reads config.json and the headers of safetensors files. Exits with 1 after an error.",
    )
    command.add_argument(
        "directory", type=Path, metavar="DIR",
        help="a language model, a vision encoder or a whole model, as save_pretrained or the hub leaves it",
    )  # fmt: skip
    command.set_defaults(run=inspect)


def inspect(options: argparse.Namespace) -> int:
    """Prints what each part is. Returns 0, or 1 when a part does not fit.

    Raises:
        ConfigError: there is no config.json, or it is one of a model of which nothing is read.
    """
    from nvlm_train.recipe import inspection

    found = inspection.inspect(options.directory)
    for part in found:
        sys.stdout.writelines(f"{line}\n" for line in inspection.report(part))
    return int(not all(part.fits for part in found))
