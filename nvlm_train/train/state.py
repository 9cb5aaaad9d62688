"""What a checkpoint says about itself: a small JSON beside megatron-core's shards, and the checks on it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nvlm_train import __version__
from nvlm_train.config.schema import Recipe
from nvlm_train.errors import CheckpointError
from nvlm_train.train.schedule import Position

FILE_NAME = "state.json"
FORMAT = 1
_DATA_FIELDS = (
    "trainable", "blend", "sequence_length", "batch", "tiling", "system_message", "prompts",
)  # fmt: skip
"""Fields of a stage that decide what its step n is: changing one under a half-done stage breaks resume."""


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
    outside: dict[str, str] = dataclasses.field(default_factory=dict)
    """Digest of each file that counts and is in no checkpoint, by the recipe's field (outside.py)."""

    @property
    def position(self) -> Position:
        return Position(self.stage, self.step)

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


def plain_recipe(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON would give it back, so that a stored one compares equal."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(recipe), default=dict))
    return plain


def write_state(state: RunState, directory: Path) -> None:
    """Writes state.json into a checkpoint that is being made."""
    (directory / FILE_NAME).write_text(json.dumps(dataclasses.asdict(state), indent=1) + "\n")


def read_state(directory: Path) -> RunState:
    """Reads state.json.

    Raises:
        CheckpointError: it is damaged, or was written by another format of this project.
    """
    try:
        stored = json.loads((directory / FILE_NAME).read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{directory / FILE_NAME} is damaged: {error}") from error
    if stored.get("format") != FORMAT:
        raise CheckpointError(
            f"{directory}: format={stored.get('format')}, this version reads {FORMAT}; "
            "resume it with the nvlm-train that wrote it"
        )
    return RunState(**{**stored, "layout": tuple(stored["layout"])})


def check_resumable(state: RunState, recipe: Recipe, directory: Path) -> None:
    """A half-done stage goes on only where its model, seed and data are what they were.

    Raises:
        CheckpointError: names every field that differs, with both values.
    """
    now, then = plain_recipe(recipe), state.recipe
    wrong = [*_differences(then["model"], now["model"], "model")]
    if then["seed"] != now["seed"]:
        wrong.append(f"seed={now['seed']}, was {then['seed']}")
    if state.stage not in now["stages"]:
        raise CheckpointError(
            f"{directory} is in stage {state.stage}, which the recipe's schedule does not have; "
            "use another run_dir"
        )
    if state.step < recipe.stages[state.stage].steps:
        before, after = then["stages"][state.stage], now["stages"][state.stage]
        for field in _DATA_FIELDS:
            wrong += _differences(before[field], after[field], f"stages.{state.stage}.{field}")
    if wrong:
        raise CheckpointError(
            f"{directory} was made by another recipe:\n"
            + "\n".join(f"  - {line}" for line in wrong)
            + "\nstart a new run with another run_dir, or put the values back"
        )


def _differences(then: Any, now: Any, path: str) -> list[str]:
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        keys = sorted({*then, *now})
        return [
            line
            for key in keys
            for line in _differences(then.get(key), now.get(key), f"{path}.{key}")
        ]
    return [] if then == now else [f"{path}={now}, was {then}"]
