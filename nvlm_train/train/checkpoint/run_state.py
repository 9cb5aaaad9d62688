"""Reads and writes state.json, in which a checkpoint describes itself beside megatron-core's shards."""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nvlm_train import __version__
from nvlm_train.errors import CheckpointError, FormatError
from nvlm_train.parallel.topology import Layout
from nvlm_train.train.schedule import Position

FILE_NAME = "state.json"
FORMAT = 3
"""1 was written until weight decay left norms, biases and gates alone, 2 until each rank saved a share of its
own. All have the same tensors under the same names, in other pieces."""
READABLE = (1, 2, FORMAT)


@dataclass(frozen=True)
class RunState:
    """Holds everything of a checkpoint but its tensors.

    Versions are there for a person to read; all other fields are checked when a run resumes.
    """

    stage: str
    step: int
    recipe: dict[str, Any]
    layout: Layout
    """The layout that saved."""
    shard_digests: dict[str, str]
    """Index digest of every shard of the stage's blend, by path."""
    weights_fingerprint: dict[str, float]
    """Sum of the weights' magnitudes by part, equal in every layout. Loaded weights must add up to it."""
    wandb_run_id: str | None
    versions: dict[str, str]
    format: int = FORMAT
    device: str | None = None
    """Kind of device that the generators ran on: `cpu` or `cuda`."""
    outside: dict[str, str] = dataclasses.field(default_factory=dict)
    """Digest of each file that matters and is in no checkpoint, by the recipe's field (outside.py)."""

    @property
    def position(self) -> Position:
        return Position(self.stage, self.step)

    def has_generators_for(self, layout: Layout, device: str) -> bool:
        """Returns whether dropout can go on with the stored generators: same layout, same kind of device.

        The generators of format 1 were the same on all data-parallel ranks, so they are not used.
        """
        return self.format > 1 and (self.layout, self.device) == (layout, device)

    @property
    def ends_stage(self) -> bool:
        """Returns whether the stage was over, by the recipe that the checkpoint was saved with."""
        steps: int = self.recipe["stages"][self.stage]["steps"]
        return self.step >= steps


@functools.cache
def library_versions() -> dict[str, str]:
    """Returns the versions of the libraries that decide what the numbers are."""
    return {
        "nvlm-train": __version__,
        **{name: version(name) for name in ("torch", "megatron-core")},
    }


def plain_recipe(recipe: Any) -> dict[str, Any]:
    """Returns a recipe, or a group of it, as JSON gives it back, so that a stored one compares equal."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(recipe), default=dict))
    return plain


def write_state(state: RunState, directory: Path) -> None:
    """Writes state.json into a checkpoint that is being made."""
    (directory / FILE_NAME).write_text(json.dumps(dataclasses.asdict(state), indent=1) + "\n")


def read_state(directory: Path) -> RunState:
    """Reads state.json.

    Raises:
        CheckpointError: it is damaged.
        FormatError: it has a format that this version does not read.
    """
    try:
        stored = json.loads((directory / FILE_NAME).read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{directory / FILE_NAME} is damaged: {error}") from error
    if stored.get("format") not in READABLE:
        writer = stored.get("versions", {}).get("nvlm-train", "of another version")
        raise FormatError(
            f"{directory}: format={stored.get('format')}, this version reads "
            f"{', '.join(map(str, READABLE))}; resume it with the nvlm-train that wrote it ({writer})"
        )
    return RunState(**{**stored, "layout": Layout(*stored["layout"])})


@dataclass(frozen=True)
class Run:
    """Says where a run stands: its newest undamaged checkpoint, if there is one."""

    checkpoint: Path | None
    state: RunState | None

    @property
    def position(self) -> Position | None:
        return self.state.position if self.state else None
