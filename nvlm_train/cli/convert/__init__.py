"""`nvlm convert COMMAND`: one module a command, each with `add_parser`; imported when it runs."""

from __future__ import annotations

import argparse

from nvlm_train.cli.convert import gguf, inspect


def add_parsers(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the commands under `nvlm convert`."""
    gguf.add_parser(commands)
    inspect.add_parser(commands)
