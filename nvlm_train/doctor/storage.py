"""Checks the run directory: can it be written to, is it free, and do the checkpoints fit on its disk?"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from nvlm_train import costs
from nvlm_train.config.schema import Recipe
from nvlm_train.doctor.finding import Findings, error, ok, warning
from nvlm_train.train.run_lock import FILE_NAME as OWNER_FILE

_SPARE = 1.2
"""Free space that is asked for, as a multiple of what checkpoints need: metrics, wandb and logs need some."""


def check_run_dir(recipe: Recipe) -> Findings:
    """Checks that files can be made in the run directory, and that no other job writes there."""
    run_dir = Path(recipe.run_dir).absolute()
    place = existing_parent(run_dir)
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"nvlm doctor")
    except OSError as problem:
        yield error(
            "run_dir",
            f"run_dir={recipe.run_dir}: nothing can be written in {place}: {problem.strerror}",
            "set run_dir to a directory that every node can write to",
        )
        return
    owner = _owner(run_dir / OWNER_FILE)
    if owner is not None:
        yield error(
            "run_dir",
            f"run_dir={recipe.run_dir} is being written to by {owner}",
            "wait for that job, cancel it, or use another run_dir",
        )
    else:
        yield ok("run_dir", f"{run_dir} is writable and nobody's")


def _owner(path: Path) -> str | None:
    """Returns who holds the run's lock; None when nobody does."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return " ".join(path.read_text().split()) or "a job that has just started"
    except OSError:
        return None  # the file system has no locks; training asks SLURM instead
    finally:
        os.close(descriptor)
    return None


def check_disk(recipe: Recipe) -> Findings:
    """Checks that `checkpoint.keep_last` checkpoints and the one being written fit on the disk."""
    copies = recipe.checkpoint.keep_last + 1
    sizes = {
        name: costs.checkpoint_bytes(recipe.model, recipe.stages[name], recipe.precision)
        for name in recipe.schedule
    }
    for name, size in sizes.items():
        yield ok("disk", f"a checkpoint of stage {name} takes about {gigabytes(size)}")
    run_dir = Path(recipe.run_dir).absolute()
    there = sum(path.stat().st_size for path in run_dir.glob("checkpoints/**/*") if path.is_file())
    needed = max(0, copies * max(sizes.values()) - there)
    free = shutil.disk_usage(existing_parent(run_dir)).free
    text = (
        f"{gigabytes(free)} free at {existing_parent(run_dir)}; {copies} checkpoints "
        f"(checkpoint.keep_last={recipe.checkpoint.keep_last} and one being written) need "
        f"{gigabytes(needed)} more"
    )
    remedy = "free space, lower checkpoint.keep_last, or set run_dir to a larger disk"
    if free < needed:
        yield error("disk", text, remedy)
    elif free < _SPARE * needed:
        yield warning("disk", f"{text}: it is tight", remedy)
    else:
        yield ok("disk", text)


def existing_parent(path: Path) -> Path:
    """Returns the directory itself, or the nearest directory above it that exists."""
    while not path.is_dir():
        path = path.parent
    return path


def gigabytes(size: float) -> str:
    """Returns a number of bytes in a readable unit.

    >>> gigabytes(6.55e9), gigabytes(3e6)
    ('6.5 GB', '3.0 MB')
    """
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
