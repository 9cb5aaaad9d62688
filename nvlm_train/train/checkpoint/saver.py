"""Saves checkpoints when they are due, and handles saves that fail.

A checkpoint is written into a directory with a temporary name. When every rank's shards are on disk, it
gets a manifest of digests and then its name (directory.py). So a directory with a name is complete,
whatever happens to the processes.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch.distributed.checkpoint.api import CheckpointException

from nvlm_train.config.schema import CheckpointConfig
from nvlm_train.errors import CheckpointError, TrainingError
from nvlm_train.train.checkpoint import directory, mcore_fixes
from nvlm_train.train.checkpoint.finite import not_finite, summary
from nvlm_train.train.checkpoint.run_state import RunState, write_state
from nvlm_train.train.checkpoint.sharded_state import Plans, reason, write_request
from nvlm_train.train.checkpoint.writer_threads import WriterThreads
from nvlm_train.train.engine import Engine
from nvlm_train.train.rank_zero import on_rank_0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Save:
    """Describes a save that is being written."""

    writing: Path
    state: RunState

    @property
    def name(self) -> str:
        return f"{self.state.stage}-{self.state.step:08d}"


class Saver:
    """Saves checkpoints of a run. All ranks call every method together.

    Args:
        run_dir: the run directory.
        config: how often to save, how many checkpoints to keep, how many saves in a row may fail.

    Raises:
        CheckpointError: nothing can be written in the run directory.
    """

    def __init__(self, run_dir: Path, config: CheckpointConfig) -> None:
        self._run_dir = run_dir
        self._config = config
        self._queue = AsyncCallsQueue(persistent=True)
        self._queue.persistent_caller = self._writers = WriterThreads()
        self._under_way: _Save | None = None
        self._plans: WeakKeyDictionary[Engine, Plans] = WeakKeyDictionary()
        self._failures: list[str] = []
        """Why each save since the last successful one failed."""
        mcore_fixes.keep_results_in_the_process()
        mcore_fixes.hold_file_errors()
        on_rank_0(lambda: directory.open_directory(run_dir))

    def is_due(self, step: int, num_steps: int) -> bool:
        """Returns whether to save after `step` steps of a stage of `num_steps`."""
        return step == num_steps or step % self._config.interval_steps == 0

    def save(self, engine: Engine, state: RunState) -> None:
        """Waits for an earlier save that still runs, then starts a new one.

        Writers are threads that write copies, so training may change the weights at once.

        Raises:
            CheckpointError: on all ranks, as in `poll`.
            TrainingError: on all ranks, when a weight or a moment is not finite. Nobody could go on
                from such a checkpoint, so it never replaces a good one.
        """
        self._finish(blocking=True)
        self._check_finite(engine, state)
        name = f"{state.stage}-{state.step:08d}"
        self._attempt(name, lambda: self._start(engine, state, name))
        if not self._config.asynchronous:
            self._finish(blocking=True)

    def poll(self) -> None:
        """Publishes a save whose writers are done. It costs nothing when no save runs.

        Raises:
            CheckpointError: on all ranks, when more saves in a row failed than the recipe allows.
        """
        self._finish(blocking=False)

    def wait(self) -> None:
        """Waits until the last save is published.

        Raises:
            CheckpointError: on all ranks, when it failed, even if the recipe allows failed saves.
        """
        self._finish(blocking=True)
        if self._failures:
            raise CheckpointError(self._failures[-1])

    def close(self) -> None:
        """Waits for the last save and ends the writers."""
        self.wait()
        self._queue.close()

    def _check_finite(self, engine: Engine, state: RunState) -> None:
        if broken := not_finite(engine):
            complete = on_rank_0(lambda: directory.complete_checkpoints(self._run_dir))
            raise TrainingError(
                f"stage={state.stage} step={state.step}: no checkpoint is saved: {summary(broken)}; "
                f"{_newest(complete)}; lower stages.{state.stage}.optimizer.lr="
                f"{engine.stage.optimizer.lr}, or look at the data of the steps since, and start "
                "the same command again"
            )

    def _start(self, engine: Engine, state: RunState, name: str) -> None:
        writing = on_rank_0(lambda: directory.begin(self._run_dir, name))
        self._under_way = save = _Save(writing, state)
        request = write_request(engine, writing, self._plans.setdefault(engine, Plans()))
        self._writers.copied = engine.copied
        on_rank_0(partial(_raise_held_error, writing))
        request.add_finalize_fn(lambda: self._publish(save))
        self._queue.schedule_async_request(request)

    def _finish(self, blocking: bool) -> None:
        if self._under_way is None:
            return
        self._attempt(
            self._under_way.name, lambda: self._queue.maybe_finalize_async_calls(blocking=blocking)
        )

    def _publish(self, save: _Save) -> None:
        on_rank_0(partial(_raise_held_error, save.writing))
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, self._writers.digests)
        digests = {name: digest for each in gathered for name, digest in each.items()}

        def publish() -> None:
            write_state(save.state, save.writing)
            logger.info("saved %s", directory.publish(save.writing, save.name, digests))

        on_rank_0(publish)
        self._under_way, self._failures = None, []
        if dist.get_rank() == 0:
            directory.prune(self._run_dir, self._config)

    def _attempt(self, name: str, action: Callable[[], object]) -> None:
        """Runs a part of a save. Counts a failure, and raises it when there were too many."""
        try:
            action()
        except (CheckpointError, CheckpointException) as error:
            # Rank 0 knows the most, so every rank raises what rank 0 says.
            self._failures.append(on_rank_0(partial(self._clean_up, name, reason(error))))
            self._under_way = None
            self._plans.clear()
            if len(self._failures) > self._config.max_failed_saves:
                raise CheckpointError(self._failures[-1]) from None
            if dist.get_rank() == 0:
                logger.error("%s", self._failures[-1])

    def _clean_up(self, name: str, reason: str) -> str:
        """Removes what was written, and returns what happened and what to do about it."""
        checkpoints = directory.checkpoint_dir(self._run_dir)
        usage = shutil.disk_usage(self._run_dir)
        if self._under_way is not None:
            directory.give_up(self._under_way.writing)
        complete = directory.complete_checkpoints(self._run_dir)
        return (
            f"checkpoint {name} was not saved: {reason}\n"
            f"  {checkpoints} had {usage.free / 2**30:.2f} GiB free of "
            f"{usage.total / 2**30:.2f} GiB; {_newest(complete)}\n"
            f"  failed saves in a row: {len(self._failures) + 1}, allowed by "
            f"checkpoint.max_failed_saves: {self._config.max_failed_saves}\n"
            "  make room or repair the disk (checkpoint.keep_last="
            f"{self._config.keep_last} takes the most); where the run has ended, start the same command again"
        )


def _newest(complete: list[Path]) -> str:
    if not complete:
        return "there is none"
    return f"the newest complete one is {complete[-1].name}"


def _raise_held_error(writing: Path) -> None:
    error = mcore_fixes.take_held_error()
    if error is not None:
        raise CheckpointError(directory.disk_trouble(writing) or str(error))
