"""Watches a run for the train loop: losses, stragglers, hangs. Says when to go back to a checkpoint."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist

from nvlm_train.config.schema import Recipe
from nvlm_train.errors import TrainingError
from nvlm_train.train.engine import StageWork
from nvlm_train.train.health.activity import Activity, Doing
from nvlm_train.train.health.heartbeat import Heartbeat
from nvlm_train.train.health.left_out import (
    LeftOut,
    append_left_out,
    around,
    indices,
    read_left_out,
)
from nvlm_train.train.health.losses import LossWatch, NotFiniteStep, Spike
from nvlm_train.train.health.samples import write_samples
from nvlm_train.train.health.stragglers import StragglerReport
from nvlm_train.train.health.watchdog import Member, Watchdog
from nvlm_train.train.rank_zero import on_rank_0
from nvlm_train.train.reduce_metrics import StepResult
from nvlm_train.train.schedule import Position
from nvlm_train.train.tracking.metrics_log import FILE_NAME as METRICS
from nvlm_train.train.tracking.metrics_log import read_metrics
from nvlm_train.train.tracking.step_record import StepSeconds

logger = logging.getLogger(__name__)


class Health:
    """Watches this process and its losses. All ranks call every method but `close` together."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe, self._config = recipe, recipe.health
        self._run_dir, self._is_first = Path(recipe.run_dir), dist.get_rank() == 0
        self._activity = Activity()
        life = f"{on_rank_0(time.time_ns):x}"
        member = Member(self._run_dir, dist.get_rank(), dist.get_world_size(), life)
        self._watchdog = Watchdog(member, self._config, self._activity)
        self._heartbeat = (
            Heartbeat(self._run_dir, self._activity, self._config.heartbeat_seconds)
            if self._is_first
            else None
        )
        self._stragglers = StragglerReport(self._config)
        self._losses = LossWatch(self._config)
        self._left_out: list[LeftOut] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close("ended" if kind is None else "failed")

    def close(self, doing: Doing) -> None:
        """Ends the threads. A rank may call it alone."""
        self._activity.end(doing)
        self._watchdog.close()
        if self._heartbeat is not None:
            self._heartbeat.close()

    def start_stage(self, position: Position) -> frozenset[int]:
        """Notes that a stage starts or goes on.

        Returns:
            The steps that the stage leaves out, counted from 0.

        Raises:
            TrainingError: the stage's last step is among them.
        """
        self._activity.start_stage(position.stage, position.step)
        self._watchdog.progressed()
        history, self._left_out = on_rank_0(
            lambda: (self._history(position), read_left_out(self._run_dir))
        )
        self._losses = LossWatch(self._config, history)
        self._stragglers = StragglerReport(self._config)
        steps = indices(self._left_out, position.stage)
        if any(step >= self._recipe.stages[position.stage].steps - 1 for step in steps):
            raise TrainingError(
                f"{self._run_dir}/left_out_steps.json leaves out the last step of stage {position.stage}, "
                f"step {self._recipe.stages[position.stage].steps}, which ends it with a save: take it out"
            )
        return steps

    def _history(self, position: Position) -> list[tuple[float, bool]]:
        """Reads (loss, whether the step was finite) of the stage's earlier steps from metrics.jsonl."""
        path = self._run_dir / METRICS
        records = read_metrics(path) if path.exists() else ()
        return [
            (float(each["loss"]), not each.get("not_finite"))
            for each in records
            if each["stage"] == position.stage and int(each["step"]) <= position.step
        ]

    def stepped(
        self, done: Position, result: StepResult, seconds: StepSeconds, work: StageWork
    ) -> dict[str, Any]:
        """Notes that a step is done. Returns what its record should say about the run's health."""
        self._activity.stepped(done.step, result.loss)
        self._watchdog.progressed()
        report: dict[str, Any] = self._stragglers.add(seconds, work.engine.topology)
        return report if result.is_finite else {**report, **vars(NotFiniteStep())}

    def must_roll_back(self, done: Position, result: StepResult, work: StageWork) -> bool:
        """Returns whether the loss spiked and the recipe asks for a rollback.

        Raises:
            TrainingError: too many steps in a row were not finite, or too many rollbacks did not help.
        """
        spike = self._losses.add(result.loss, result.is_finite)
        if not result.is_finite:
            self._report_not_finite(done, result, work)
        if spike is None or self._config.spike == "off":
            return False
        return self._report_spike(done, result, work, spike)

    def _report_not_finite(self, done: Position, result: StepResult, work: StageWork) -> None:
        where = self._write_samples("not-finite", done, result, work)
        count, allowed = self._losses.not_finite_in_a_row, self._config.max_non_finite_steps
        what = (
            f"stage={done.stage} step={done.step}: loss={result.loss} grad_norm={result.grad_norm}"
        )
        if count > allowed:
            raise TrainingError(
                f"{what}: {count} step(s) in a row without finite numbers, health.max_non_finite_steps="
                f"{allowed} allows {allowed}; none of them changed the weights: look at the samples in "
                f"{where}, lower stages.{done.stage}.optimizer.lr, or go back to an older checkpoint"
            )
        if self._is_first:
            logger.warning(
                "%s: the step is left out on all ranks, weights and optimizer are as before it "
                "(%d in a row, health.max_non_finite_steps=%d); its samples: %s",
                what,
                count,
                allowed,
                where,
            )

    def _report_spike(
        self, done: Position, result: StepResult, work: StageWork, spike: Spike
    ) -> bool:
        where = self._write_samples("spike", done, result, work)
        sigmas = (spike.loss - spike.median) / spike.deviation
        what = (
            f"loss spike: stage={done.stage} step={done.step} loss={spike.loss:.4f}, "
            f"{sigmas:.0f} deviations above the median {spike.median:.4f} of the last "
            f"{self._config.spike_window} steps (health.spike_threshold="
            f"{self._config.spike_threshold}); its samples: {where}"
        )
        is_last = done.step >= self._recipe.stages[done.stage].steps
        if self._config.spike == "rollback" and not is_last:
            if len(self._left_out) >= self._config.max_rollbacks:
                raise TrainingError(
                    f"{what}; {len(self._left_out)} rollback(s) were made already, health.max_rollbacks="
                    f"{self._config.max_rollbacks}: lower stages.{done.stage}.optimizer.lr, or allow more"
                )
            return True
        if self._is_first:
            logger.warning("%s", what)
        return False

    def _write_samples(
        self, kind: str, done: Position, result: StepResult, work: StageWork
    ) -> Path:
        path = self._run_dir / "health" / f"{kind}-{done.stage}-{done.step:08d}.json"
        if self._is_first:
            write_samples(path, work.plan, done, result, work.engine.topology.data_size)
        return path

    def leave_out(self, done: Position, result: StepResult, newest: Position | None) -> None:
        """Records that the steps around `done` are left out, because the run goes back to `newest`.

        Args:
            done: the step with the spike.
            result: what that step reported.
            newest: where the newest checkpoint stands; None when there is none.
        """
        saved = newest.step if newest is not None and newest.stage == done.stage else 0
        num_steps = self._recipe.stages[done.stage].steps
        left_out = around(done.step, self._config.spike_skip_steps, saved, num_steps)
        assert left_out is not None, "the spike is later than the checkpoint and not the last step"
        first, last = left_out
        if self._is_first:
            reason = f"loss {result.loss:.4f} at step {done.step}"
            append_left_out(self._run_dir, LeftOut(done.stage, first, last, reason))
            logger.warning(
                "rolling back: %s of stage %s; going back to step %d and on without steps %d to %d (%s)",
                reason,
                done.stage,
                saved,
                first,
                last,
                "left_out_steps.json",
            )

    @contextmanager
    def busy(self, doing: Doing) -> Iterator[None]:
        """Marks the block as something that may take longer than a step: `saving`, `evaluating`."""
        with self._activity.busy(doing):
            self._watchdog.progressed()
            yield
        self._watchdog.progressed()
