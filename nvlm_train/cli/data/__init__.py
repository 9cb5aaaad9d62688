"""`nvlm data COMMAND`: one module a command, each with `add_parser`; imported when it runs."""

from __future__ import annotations

import argparse

from nvlm_train.cli.data import check, index, prepare, show, stats


def add_parsers(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the commands under `nvlm data`."""
    index.add_parser(commands)
    prepare.add_parser(commands)
    show.add_parser(commands)
    stats.add_parser(commands)
    check.add_parser(commands)
