"""Checks services outside the process: wandb's server and SLURM's queue."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import urllib.error
import urllib.request

from nvlm_train.config.schema import Recipe
from nvlm_train.doctor.finding import Findings, error, ok, warning

_SECONDS = 10
"""How long a server may take to answer."""


def check_wandb(recipe: Recipe) -> Findings:
    """Checks wandb's mode, credentials and server. Training goes on without a server, so it is no error."""
    mode = recipe.tracking.wandb
    if mode == "off":
        yield ok("wandb", "off; metrics.jsonl is written")
        return
    if mode == "offline":
        yield ok("wandb", f"offline; upload with `wandb sync {recipe.run_dir}/wandb/offline-run-*`")
        return
    from nvlm_train.train.tracking.wandb_run import login, server

    if login() is None:
        yield error(
            "wandb",
            f"tracking.wandb=online, but there are no credentials for {server()}",
            "run `wandb login`, set WANDB_API_KEY on every node, or use tracking.wandb=offline",
        )
        return
    problem = _unreachable(server())
    if problem:
        yield warning(
            "wandb",
            f"{server()} does not answer from here ({problem})",
            "training goes on and records offline; check WANDB_BASE_URL and HTTPS_PROXY, "
            "or use tracking.wandb=offline",
        )
    else:
        yield ok("wandb", f"online: credentials for {server()}, which answers")


def _unreachable(url: str) -> str | None:
    try:
        with urllib.request.urlopen(url, timeout=_SECONDS):
            return None
    except urllib.error.HTTPError:
        return None  # it answers; the page does not matter
    except OSError as problem:
        return str(getattr(problem, "reason", problem))


def check_slurm(script: str, options: str) -> Findings:
    """Checks that the launch script parses, and that SLURM would accept it with these options.

    Args:
        script: path of the batch script.
        options: options of sbatch, as typed in a shell.
    """
    found = _run(["bash", "-n", script])
    if found.returncode:
        yield error("slurm", f"{script}: {found.stderr.strip()}", "correct the script")
        return
    yield ok("slurm", f"{script} parses")
    if shutil.which("sbatch") is None:
        yield ok("slurm", "no sbatch on this machine")
        return
    # Inside a job these would become the new job's options.
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    found = _run(["sbatch", "--test-only", *shlex.split(options), script], clean)
    said = (found.stderr or found.stdout).strip()
    if found.returncode and options:
        remedy = "correct --sbatch; `sinfo` lists partitions, `sacctmgr show assoc` your accounts"
        yield error("slurm", f"sbatch {options} {script}: {said}", remedy)
    elif found.returncode:
        # The run may be meant for torchrun, and this machine have sbatch without a cluster.
        yield warning("slurm", f"sbatch {script}: {said}", "for a SLURM run give --sbatch OPTIONS")
    else:
        yield ok("slurm", said.removeprefix("sbatch: "))


def _run(
    command: list[str], environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=60, check=False
    )
