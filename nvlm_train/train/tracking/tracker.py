"""Sends the record of each step to metrics.jsonl, to the terminal, and on request to wandb."""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from nvlm_train.config.schema import Recipe
from nvlm_train.train.tracking.metrics_log import MetricsLog, Record
from nvlm_train.train.tracking.progress import open_view
from nvlm_train.train.tracking.wandb_run import WandbRun

if TYPE_CHECKING:
    from nvlm_train.train.tracking.examples import Example


class Tracker:
    """Records steps on rank 0; on the other ranks it does nothing.

    A resumed run and a later stage continue the wandb run whose id the checkpoint carries.

    Args:
        recipe: its run directory, name and `tracking` are used.
        run_id: wandb's id of the run that is continued, or None for a new one.
        steps_done: steps that the whole run has done; later records in metrics.jsonl are dropped.
        rank: this process's rank; by default the launcher's RANK.

    Raises:
        ImportError: the recipe asks for wandb, and it is not installed.
    """

    def __init__(
        self, recipe: Recipe, run_id: str | None, steps_done: int, *, rank: int | None = None
    ) -> None:
        self.run_id = run_id
        self._every = recipe.tracking.log_every
        self._is_active = (int(os.environ.get("RANK", "0")) if rank is None else rank) == 0
        if not self._is_active:
            return
        self._metrics = MetricsLog(recipe.run_dir, steps_done)
        self._wandb: WandbRun | None = None
        if recipe.tracking.wandb != "off":
            self._wandb = WandbRun(recipe, run_id, steps_done, self._metrics.path)
            self.run_id = self._wandb.id
        total = sum(recipe.stages[name].steps for name in recipe.schedule)
        self._view = open_view(total, steps_done, self._every)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(0 if kind is None else 1)

    def log(self, record: Record) -> None:
        """Records one step. The record has `stage`, `step`, `global_step` and numbers."""
        if not self._is_active:
            return
        self._metrics.append(record)
        self._view.show(record)
        if self._wandb is not None:
            self._wandb.log(record)

    def log_examples(self, stage: str, global_step: int, rows: Sequence[Example]) -> None:
        """Records answers to a few samples. They go to wandb only."""
        if self._is_active and self._wandb is not None:
            self._wandb.log_examples(stage, global_step, rows)

    def rewind(self, steps_done: int) -> None:
        """Drops the records of later steps: these are trained again or left out. wandb keeps both records."""
        if self._is_active:
            self._metrics.rewind(steps_done)

    def close(self, exit_code: int = 0) -> None:
        """Ends the record. wandb shows a run with another exit code than 0 as failed."""
        if not self._is_active:
            return
        self._view.close()
        self._metrics.close()
        if self._wandb is not None:
            self._wandb.close(exit_code)
