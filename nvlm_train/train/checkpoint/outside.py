"""Checks files that decide a run's numbers but are in no checkpoint, and may change under the same name.

Checkpoints hold what trains and the frozen language model, and a stage's plan holds digests of its shards
and of how they are encoded (data/plan/plan.py). What remains are the vision encoder and the tokenizer.
They are checked when a run resumes, when a stage hands over to the next, and when the trained model
generates.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from nvlm_train.config.schema import Recipe
from nvlm_train.errors import CheckpointError, NvlmError
from nvlm_train.tokens import Tokenizer
from nvlm_train.vision.digest import encoder_digest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Reading:
    """Holds the digests that one rank read, or why it could not."""

    digests: dict[str, str]
    failure: str | None = None


def digests_outside(recipe: Recipe) -> dict[str, str]:
    """Returns the digest of each file by the recipe's field. Called by all ranks at each stage's start.

    One rank of each node reads the files, because copies on local disks may differ under one path.

    Raises:
        CheckpointError: on every rank, when a file is missing or damaged, or differs between nodes.
    """
    reads = int(os.environ.get("LOCAL_RANK", "0")) == 0
    found: list[_Reading | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, _read(recipe) if reads else None)
    readings = {rank: reading for rank, reading in enumerate(found) if reading is not None}
    for rank, reading in readings.items():
        if reading.failure is not None:
            raise CheckpointError(f"rank {rank} could not read what counts:\n{reading.failure}")
    first = next(iter(readings.values())).digests
    wrong = [
        f"{field} has digest {digest[:12]} on rank {rank}, {first[field][:12]} on the first node"
        for rank, reading in readings.items()
        for field, digest in reading.digests.items()
        if digest != first[field]
    ]
    if wrong:
        raise CheckpointError(
            "nodes have other files under the same name:\n"
            + "\n".join(f"  - {line}" for line in wrong)
            + "\nevery rank must read the same; copy them anew, or to a file system that all share"
        )
    return first


def _read(recipe: Recipe) -> _Reading:
    model = recipe.model
    try:
        return _Reading(
            {
                "model.vision.weights": encoder_digest(model.vision, recipe.seed),
                "model.tokenizer.path": Tokenizer(model.tokenizer).digest,
            }
        )
    except (OSError, NvlmError) as error:
        return _Reading({}, str(error))


def check_outside(
    recorded: Mapping[str, str], now: Mapping[str, str], recipe: Recipe, directory: Path
) -> None:
    """Compares the files with those that a checkpoint was trained with.

    Args:
        recorded: the digests in `state.json`. A digest that it lacks, because an older version wrote
            it, cannot be compared, and rank 0 says so.
        now: what `digests_outside` returned.
        recipe: names the files.
        directory: the checkpoint.

    Raises:
        CheckpointError: names every file that differs.
    """
    paths = {
        "model.vision.weights": recipe.model.vision.weights,
        "model.tokenizer.path": recipe.model.tokenizer.path,
    }
    wrong = [
        f"{field}={paths[field]} has digest {now[field][:12]}, had {recorded[field][:12]}"
        for field in now
        if field in recorded and recorded[field] != now[field]
    ]
    if wrong:
        raise CheckpointError(
            f"{directory} was trained with other files of the same name:\n"
            + "\n".join(f"  - {line}" for line in wrong)
            + "\nno checkpoint holds them, and the trained weights fit the old ones only; put those "
            "back, or start a new run with another run_dir"
        )
    unknown = [field for field in now if field not in recorded]
    if unknown and dist.get_rank() == 0:
        logger.warning(
            "%s does not say what %s were, because an older nvlm-train wrote it: whether they are "
            "the same could not be checked; the next checkpoint will say it",
            directory, " and ".join(unknown),
        )  # fmt: skip
