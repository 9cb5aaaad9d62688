"""`nvlm doctor`: finds what would go wrong, before GPUs are used."""

from __future__ import annotations

import argparse
import math
import sys


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command; its overrides are those of `nvlm train`."""
    command = commands.add_parser(
        "doctor",
        help="check a recipe, its data and the machines before training",
        description="Runs alone, or on all ranks under torchrun or srun. Exits with 1 after an error.",
    )
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for nvlm train")
    command.add_argument("--recipes", metavar="DIR", help="your own recipes")
    command.add_argument(
        "--all-shards",
        action="store_true",
        help="count the labels of every shard, and make missing indexes (default: a few per source)",
    )
    command.add_argument(
        "--script", metavar="FILE", help="batch script (default: launch/slurm.sbatch)"
    )
    command.add_argument(
        "--sbatch", default="", metavar="OPTIONS", help="options for sbatch --test-only"
    )
    command.add_argument(
        "--timeout",
        type=_seconds,
        default=60,
        metavar="SECONDS",
        help="how long to wait for a silent rank (default: 60)",
    )
    command.add_argument("--json", metavar="FILE", help="write the findings there, too")
    command.set_defaults(run=doctor)


def _seconds(text: str) -> float:
    """Reads a finite time above 0. A wait for NaN seconds would never end."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no time to wait; give seconds above 0")
    return value


def doctor(options: argparse.Namespace) -> int:
    """Prints findings as they are made. Returns 0, or 1 when one of them is an error."""
    from nvlm_train.doctor import stack

    if missing := list(stack.lacking()):
        # No other check is possible: they import what is missing.
        sys.stdout.writelines(f"{each.level}: {each.text}; {each.remedy}\n" for each in missing)
        return 1
    from nvlm_train.doctor.checkup import Request, examine
    from nvlm_train.doctor.material import SHARDS_READ

    return examine(
        Request(
            overrides=options.overrides,
            recipes=options.recipes,
            shards_read=None if options.all_shards else SHARDS_READ,
            script=options.script,
            sbatch=options.sbatch,
            seconds=options.timeout,
            json=options.json,
        )
    )
