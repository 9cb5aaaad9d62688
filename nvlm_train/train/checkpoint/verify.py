"""Finds the checkpoint to go on from: the newest one whose files are undamaged, agreed on by all ranks."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from nvlm_train.errors import CheckpointError, FormatError
from nvlm_train.train.checkpoint import directory, manifest
from nvlm_train.train.checkpoint.run_state import read_state
from nvlm_train.train.rank_zero import on_rank_0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """Says which checkpoints of a run directory can be used."""

    checkpoint: Path | None
    """The newest undamaged one; None when there is no checkpoint at all."""
    damaged: tuple[Path, ...]
    """Newer ones, which must not be used."""


def newest_undamaged(run_dir: Path) -> Found:
    """Reads checkpoints from the newest backwards until one is undamaged. Called by all ranks together.

    Raises:
        CheckpointError: there are checkpoints, and all of them are damaged.
        FormatError: one has a format that this version does not read.
    """
    refused: dict[Path, list[str]] = {}
    for checkpoint in reversed(on_rank_0(lambda: directory.named_checkpoints(run_dir))):
        problems = find_damage(checkpoint)
        if not problems:
            if refused:
                _log_error(f"using the one before: {checkpoint}")
            return Found(checkpoint, tuple(refused))
        refused[checkpoint] = problems
        _log_error(_report(checkpoint, problems))
    if refused:
        raise CheckpointError(
            "\n".join(_report(*each) for each in refused.items())
            + f"\nno undamaged checkpoint is left in {directory.checkpoint_dir(run_dir)}; restore one from "
            "a copy, or remove the damaged ones to start from the beginning"
        )
    return Found(None, ())


def find_damage(checkpoint: Path) -> list[str]:
    """Returns what is wrong with a checkpoint. Each rank reads a share of its files.

    Returns:
        The same list on every rank; empty for an undamaged checkpoint.

    Raises:
        FormatError: another version of this project wrote it, so nothing need be wrong with it.
    """
    try:
        content = on_rank_0(lambda: manifest.read_manifest(checkpoint))
    except FormatError:
        raise
    except CheckpointError as error:
        return [str(error)]
    by_size = sorted(content.files, key=lambda name: content.files[name].bytes)
    mine = by_size[dist.get_rank() :: dist.get_world_size()]
    try:
        with directory.being_read(checkpoint):
            problems = manifest.damage(checkpoint, content, mine)
    except OSError as error:
        problems = [f"cannot be read: {error}"]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, problems)
    found = [problem for each in gathered for problem in each]
    return found or on_rank_0(lambda: _not_finite(checkpoint))


def _not_finite(checkpoint: Path) -> list[str]:
    """Names parts whose weights are not finite. Older versions published such checkpoints."""
    return [
        f"weights of {part} are not finite: their magnitudes add up to {total}"
        for part, total in read_state(checkpoint).weights_fingerprint.items()
        if not math.isfinite(total)
    ]


def _report(checkpoint: Path, problems: list[str]) -> str:
    return f"CHECKPOINT IS DAMAGED: {checkpoint}\n" + "\n".join(f"  - {each}" for each in problems)


def _log_error(message: str) -> None:
    if dist.get_rank() == 0:
        logger.error("%s", message)
