"""`nvlm launch`: checks a run before anything is queued, then submits it to SLURM."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    command = commands.add_parser("launch", help="check a run and submit it to SLURM")
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides")
    command.add_argument("--recipes", metavar="DIR", help="your own recipes")
    command.add_argument("--nodes", type=int, default=1)
    command.add_argument("--gpus-per-node", type=int, default=8, help="0: on CPUs (default: 8)")
    command.add_argument("--ranks-per-node", type=int, help="default: as many as GPUs", metavar="N")
    command.add_argument("--image", help="container, where SLURM has pyxis")
    command.add_argument(
        "--ablations", metavar="FILE", help="a job array: one run a line, as overrides"
    )
    command.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="one more option of sbatch, such as --sbatch=--partition=main; may be repeated",
    )
    command.add_argument(
        "--dry-run", action="store_true", help="print script and command, check both, queue nothing"
    )
    command.set_defaults(run=launch)


def launch(options: argparse.Namespace) -> int:
    """Prints the command and what was checked, then submits the run.

    With --dry-run it prints the script as well, and submits nothing.

    Raises:
        ConfigError: a recipe does not load, or does not fit the nodes.
        LaunchError: SLURM would refuse the script or the options.
    """
    from nvlm_train.cli.submission import Submission, check

    submission = Submission(
        overrides=tuple(options.overrides),
        recipes=options.recipes,
        nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        ranks_per_node=options.ranks_per_node or options.gpus_per_node,
        image=options.image,
        ablations=options.ablations,
        extra=tuple(options.sbatch),
    )
    if options.dry_run:
        sys.stdout.write(f"# {submission.script}\n{submission.script.read_text()}\n")
    environment = "".join(f"{key}={shlex.quote(v)} " for key, v in submission.environment.items())
    sys.stdout.write(f"# command\n{environment}{shlex.join(submission.command())}\n\n")
    for line in check(submission):
        sys.stdout.write(f"ok: {line}\n")
    if options.dry_run:
        return 0
    sys.stdout.flush()
    return subprocess.run(
        submission.command(), env=submission.full_environment(), check=False
    ).returncode
