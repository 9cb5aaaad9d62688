"""A run that is to be submitted to SLURM: its exact command, and the checks before it is queued."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from nvlm_train.config import rules
from nvlm_train.config.paths import batch_script
from nvlm_train.config.schema import Recipe
from nvlm_train.errors import ConfigError, LaunchError
from nvlm_train.recipe.load import load_recipe

WARNING_S = 300
"""Seconds before the time limit at which slurm.sbatch asks for a save."""


@dataclass(frozen=True)
class Submission:
    """Describes one submission of launch/slurm.sbatch."""

    overrides: tuple[str, ...]
    nodes: int
    gpus_per_node: int
    """0 on a cluster without GPUs."""
    ranks_per_node: int
    recipes: str | None = None
    image: str | None = None
    ablations: str | None = None
    """File with the overrides of one run per line; None for a single run."""
    extra: tuple[str, ...] = ()
    """More options of sbatch."""

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def script(self) -> Path:
        return batch_script()

    @cached_property
    def runs(self) -> list[list[str]]:
        """Returns the overrides of each run: of the single run, or of each line of the ablations.

        Raises:
            LaunchError: the file does not exist.
        """
        if self.ablations is None:
            return [list(self.overrides)]
        path = Path(self.ablations)
        if not path.is_file():
            raise LaunchError(
                f"ablations={path}: no such file; give one with overrides in each line"
            )
        lines = [line.strip() for line in path.read_text().splitlines()]
        return [
            [*self.overrides, *line.split()] for line in lines if line and not line.startswith("#")
        ]

    @property
    def environment(self) -> dict[str, str]:
        """Returns the variables that the script reads from the environment."""
        found = {}
        if self.image is not None:
            found["NVLM_IMAGE"] = self.image
        if self.ablations is not None:
            found["NVLM_ABLATIONS"] = str(Path(self.ablations).resolve())
        return found

    def full_environment(self) -> dict[str, str]:
        """Returns this process's environment with the script's variables."""
        return {**os.environ, **self.environment}

    def command(self, *first: str) -> list[str]:
        """Returns the command line of sbatch, with `first` before all other options."""
        size = [f"--nodes={self.nodes}", f"--ntasks-per-node={self.ranks_per_node}"]
        if self.gpus_per_node:
            size.append(f"--gpus-per-node={self.gpus_per_node}")
        if self.ablations is not None:
            size.append(f"--array=0-{len(self.runs) - 1}")
        own = ["--recipes", self.recipes] if self.recipes else []
        return ["sbatch", *first, *size, *self.extra, str(self.script), *own, *self.overrides]


def check(submission: Submission) -> Iterator[str]:
    """Yields a line for each check that passed.

    Raises:
        ConfigError: recipes are wrong, or do not fit the nodes; it names everything that was found.
        LaunchError: the script or the options are wrong.
    """
    _check_size(submission)
    yield from _check_recipes(submission)
    _run(["bash", "-n", str(submission.script)], "the script is not bash")
    yield "bash -n: the script parses"
    seconds = _time_limit_s(submission.extra)
    if seconds is not None and seconds <= 2 * WARNING_S:
        raise LaunchError(
            f"--time={seconds // 60} min leaves no time to train: a run is told to save {WARNING_S} s "
            f"before the limit; ask for more than {2 * WARNING_S // 60} min"
        )
    if shutil.which("sbatch") is None:
        yield "no sbatch on this machine: options were not tested"
        return
    done = _run(submission.command("--test-only"), "SLURM refuses it", submission)
    yield f"sbatch --test-only: {done.removeprefix('sbatch: ')}"


def _check_size(submission: Submission) -> None:
    if submission.nodes < 1 or submission.ranks_per_node < 1:
        raise LaunchError(
            f"nodes={submission.nodes} ranks_per_node={submission.ranks_per_node}: nothing would run; "
            "give at least 1 of both (with gpus_per_node=0 state ranks_per_node)"
        )


def _check_recipes(submission: Submission) -> Iterator[str]:
    problems: list[str] = []
    loaded: list[Recipe] = []
    for overrides in submission.runs:
        shown = f" ({shlex.join(overrides)})" if submission.ablations else ""
        try:
            recipe = load_recipe(overrides, submission.recipes)
            rules.check(recipe, submission.world_size)
            loaded.append(recipe)
        except ConfigError as error:
            problems += [f"{problem}{shown}" for problem in error.problems]
    for run_dir, count in Counter(recipe.run_dir for recipe in loaded).items():
        if count > 1:
            problems.append(
                f"run_dir={run_dir} is that of {count} runs; give each line a name= or a run_dir= of its own"
            )
    if not submission.runs:
        problems.append(f"ablations={submission.ablations} has no line; give one run a line")
    if problems:
        raise ConfigError(problems)
    for recipe in loaded:
        layouts = [
            f"{name} TP {layout.tensor} x PP {layout.pipeline} x DP "
            f"{submission.world_size // (layout.tensor * layout.pipeline)}"
            for name in recipe.schedule
            for layout in [recipe.stages[name].parallel]
        ]
        ranks = f"recipe {recipe.name} on {submission.world_size} ranks"
        yield f"{ranks}: {', '.join(layouts)}; run_dir {recipe.run_dir}"


def _time_limit_s(options: tuple[str, ...]) -> int | None:
    """Returns the seconds of `--time` in any of SLURM's forms: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S."""
    for option in options:
        match = re.fullmatch(r"--time=(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", option)
        if match is None:
            continue
        days, first, second, third = (int(part or 0) for part in match.groups())
        if match[1] is not None:
            return ((days * 24 + first) * 60 + second) * 60 + third
        if match[4] is not None:
            return (first * 60 + second) * 60 + third
        return first * 60 + second
    return None


def _run(command: list[str], claim: str, submission: Submission | None = None) -> str:
    environment = submission.full_environment() if submission else None
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LaunchError(
            f"{claim}: {(done.stderr or done.stdout).strip()}\nthe command was: {shlex.join(command)}"
        )
    return (done.stderr or done.stdout).strip()
