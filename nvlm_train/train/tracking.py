"""Where the numbers of a step go: metrics.jsonl, the terminal, and wandb on request.

The only file that imports wandb, and only when a recipe asks for it.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from nvlm_train.config.schema import Recipe, TrackingConfig
from nvlm_train.train.metrics import MetricsLog, Record
from nvlm_train.train.progress import open_view

if TYPE_CHECKING:
    from wandb import Run


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
        self._wandb: Run | None = None
        if recipe.tracking.wandb != "off":
            self._wandb = _start_wandb(recipe, recipe.tracking, run_id)
            self.run_id = self._wandb.id
        self._metrics = MetricsLog(recipe.run_dir, steps_done)
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
        if self._wandb is not None and int(record["global_step"]) % self._every == 0:
            self._wandb.log(dict(record))

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
            self._wandb.finish(exit_code=exit_code)


def _start_wandb(recipe: Recipe, tracking: TrackingConfig, run_id: str | None) -> Run:
    import wandb

    Path(recipe.run_dir).mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        project=tracking.project,
        entity=tracking.entity,
        name=recipe.name,
        id=run_id,
        # Offline there is no server to ask; the shared id joins the parts when they are synced.
        resume="allow" if tracking.wandb == "online" else None,
        dir=recipe.run_dir,
        mode="online" if tracking.wandb == "online" else "offline",
        config=dataclasses.asdict(recipe),
        settings=wandb.Settings(silent=True),
    )
    # wandb's own counter would refuse steps that a resume repeats; ours is a metric like the others.
    run.define_metric("global_step")
    run.define_metric("*", step_metric="global_step")
    return run
