"""Where the numbers of a step go: metrics.jsonl, the terminal, and wandb on request.

wandb itself is in wandb_run.py.
"""

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
        recipe: says where and what.
        run_id: wandb's id of the run that is continued, or none for a new one.
        steps_done: steps of the whole run that lie behind; later records in metrics.jsonl are dropped.
        rank: defaults to the launcher's RANK.

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
        """Takes one step's record: `stage`, `step`, `global_step` and numbers."""
        if not self._is_active:
            return
        self._metrics.append(record)
        self._view.show(record)
        if self._wandb is not None:
            self._wandb.log(record)

    def log_examples(self, stage: str, global_step: int, rows: Sequence[Example]) -> None:
        """Takes answers to a few samples; they go to wandb only."""
        if self._is_active and self._wandb is not None:
            self._wandb.log_examples(stage, global_step, rows)

    def rewind(self, steps_done: int) -> None:
        """Forgets later steps: they will come again, or are left out. wandb keeps both."""
        if self._is_active:
            self._metrics.rewind(steps_done)

    def close(self, exit_code: int = 0) -> None:
        """Ends the record; wandb shows a run with another exit code than 0 as failed."""
        if not self._is_active:
            return
        self._view.close()
        self._metrics.close()
        if self._wandb is not None:
            self._wandb.close(exit_code)
