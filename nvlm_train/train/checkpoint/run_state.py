"""What a checkpoint says about itself: a small JSON beside megatron-core's shards."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nvlm_train import __version__
from nvlm_train.errors import CheckpointError, FormatError
from nvlm_train.train.schedule import Position

FILE_NAME = "state.json"
FORMAT = 2
"""1: until weight decay left norms alone; the recipe had no format. 2: today's."""
READABLE = (1, FORMAT)


@dataclass(frozen=True)
class RunState:
    """Everything but tensors. Versions are for the reader; the rest is checked on resume."""

    stage: str
    step: int
    recipe: dict[str, Any]
    layout: tuple[int, int, int]
    """TP, PP, DP at the time of saving."""
    shard_digests: dict[str, str]
    """Index digest of every shard of the stage's blend, by path."""
    weights_fingerprint: dict[str, float]
    """Sum of magnitudes by part, the same in every layout: what is loaded must add up to it."""
    wandb_run_id: str | None
    versions: dict[str, str]
    format: int = FORMAT
    device: str | None = None
    """Kind of the device that the generators' states are of: `cpu` or `cuda`."""
    outside: dict[str, str] = dataclasses.field(default_factory=dict)
    """Digest of each file that counts and is in no checkpoint, by the recipe's field (outside.py)."""

    @property
    def position(self) -> Position:
        return Position(self.stage, self.step)

    def has_generators_for(self, layout: tuple[int, int, int], device: str) -> bool:
        """Whether dropout goes on with the stored generators: in the same layout, on such a device.

        Those of format 1 were the same on all data-parallel ranks; dropout starts anew behind them.
        """
        return self.format > 1 and (self.layout, self.device) == (layout, device)

    @property
    def ends_stage(self) -> bool:
        """Whether the stage was over, by the recipe of that time."""
        steps: int = self.recipe["stages"][self.stage]["steps"]
        return self.step >= steps


def library_versions() -> dict[str, str]:
    """Of the libraries that decide what the numbers are."""
    return {
        "nvlm-train": __version__,
        **{name: version(name) for name in ("torch", "megatron-core")},
    }


def plain_recipe(recipe: Any) -> dict[str, Any]:
    """The recipe, or a group of it, as JSON would give it back, so that a stored one compares equal."""
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
            f"{' and '.join(map(str, READABLE))}; resume it with the nvlm-train that wrote it ({writer})"
        )
    return RunState(**{**stored, "layout": tuple(stored["layout"])})


@dataclass(frozen=True)
class Run:
    """Where a run directory stands: its newest complete checkpoint, if there is one."""

    checkpoint: Path | None
    state: RunState | None

    @property
    def position(self) -> Position | None:
        return self.state.position if self.state else None
