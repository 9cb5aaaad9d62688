"""Which checkpoint to go on from: the newest whose files are what was written. All ranks read, and agree."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from nvlm_train.errors import CheckpointError, FormatError
from nvlm_train.train.checkpoint import directory as files
from nvlm_train.train.checkpoint import manifest
from nvlm_train.train.checkpoint.run_state import read_state
from nvlm_train.train.rank_zero import on_rank_0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """What a run directory offers."""

    checkpoint: Path | None
    """The newest undamaged one; none where there is no checkpoint at all."""
    damaged: tuple[Path, ...]
    """Newer ones that are not to be used."""


def newest_undamaged(run_dir: Path) -> Found:
    """Reads checkpoints from the newest backwards until one is whole. Called by all ranks together.

    Raises:
        CheckpointError: there are checkpoints, and every one is damaged.
        FormatError: one is of a format that this version does not read.
    """
    refused: dict[Path, list[str]] = {}
    for checkpoint in reversed(on_rank_0(lambda: files.named_checkpoints(run_dir))):
        problems = find_damage(checkpoint)
        if not problems:
            if refused:
                _say(f"using the one before: {checkpoint}")
            return Found(checkpoint, tuple(refused))
        refused[checkpoint] = problems
        _say(_report(checkpoint, problems))
    if refused:
        raise CheckpointError(
            "\n".join(_report(*each) for each in refused.items())
            + f"\nno undamaged checkpoint is left in {files.checkpoint_dir(run_dir)}; restore one from "
            "a copy, or remove the damaged ones to start from the beginning"
        )
    return Found(None, ())


def find_damage(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint, the same list on every rank: each reads a share of its files.

    Raises:
        FormatError: nothing may be; another version of this project wrote it.
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
        with files.being_read(checkpoint):
            problems = manifest.damage(checkpoint, content, mine)
    except OSError as error:
        problems = [f"cannot be read: {error}"]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, problems)
    found = [problem for each in gathered for problem in each]
    return found or on_rank_0(lambda: _not_finite(checkpoint))


def _not_finite(checkpoint: Path) -> list[str]:
    """Such checkpoints were published before weights were looked at; nobody can go on from one."""
    return [
        f"weights of {part} are not finite: their magnitudes add up to {total}"
        for part, total in read_state(checkpoint).weights_fingerprint.items()
        if not math.isfinite(total)
    ]


def _report(checkpoint: Path, problems: list[str]) -> str:
    return f"CHECKPOINT IS DAMAGED: {checkpoint}\n" + "\n".join(f"  - {each}" for each in problems)


def _say(message: str) -> None:
    if dist.get_rank() == 0:
        logger.error("%s", message)
