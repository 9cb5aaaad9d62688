"""`nvlm data COMMAND`: one module a command, each with `add_parser`; imported when it runs."""

from __future__ import annotations

import argparse

from nvlm_train.cli import data_check, data_index, data_prepare, data_show, data_stats


def add_parsers(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The commands under `nvlm data`."""
    data_index.add_parser(commands)
    data_prepare.add_parser(commands)
    data_show.add_parser(commands)
    data_stats.add_parser(commands)
    data_check.add_parser(commands)
