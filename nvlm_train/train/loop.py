"""The train loop: the schedule's stages, and the steps of one stage."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from nvlm_train.config import rules
from nvlm_train.config.schema import Recipe
from nvlm_train.errors import TrainingError
from nvlm_train.parallel.topology import start_process_group
from nvlm_train.train import announce, start
from nvlm_train.train.checkpoint import Saver
from nvlm_train.train.examples import ExampleSet
from nvlm_train.train.record import StepTimer, step_record
from nvlm_train.train.schedule import Position, global_step, learning_rate, stages_to_run
from nvlm_train.train.signals import EXIT_REQUEUE, StopRequest
from nvlm_train.train.skips import SkipBudget
from nvlm_train.train.step import run_step
from nvlm_train.train.tracking import Tracker

logger = logging.getLogger(__name__)


def train(recipe: Recipe) -> int:
    """Runs the schedule from wherever the run directory stands to its end. Called by every rank.

    Returns:
        0 when the schedule is finished, EXIT_REQUEUE when a signal stopped it after a save.

    Raises:
        NvlmError: the user's to fix, or training that cannot go on.
    """
    start_process_group()
    rules.check(recipe, dist.get_world_size())
    announce.machine(recipe.precision)
    stop, run = StopRequest(), start.open_run(recipe)
    steps_done = global_step(recipe, run.position) if run.position else 0
    run_id = run.state.wandb_run_id if run.state else None
    with Tracker(recipe, run_id, steps_done) as tracker:
        saver = Saver(Path(recipe.run_dir), recipe.checkpoint)
        for position in stages_to_run(recipe, run.position):
            stopped = run_stage(recipe, position, tracker, saver, stop.agreed)
            saver.wait()
            if stopped:
                logger.info("stopped by a signal and saved; the same command goes on")
                return EXIT_REQUEUE
        saver.close()
    return 0


def run_stage(
    recipe: Recipe,
    position: Position,
    tracker: Tracker,
    saver: Saver,
    stop_requested: Callable[[], bool],
) -> bool:
    """Trains one stage from `position`. Returns whether a signal stopped it before its end."""
    stage = recipe.stages[position.stage]
    work = start.start_stage(recipe, position, start.open_run(recipe))
    engine, plan = work.engine, work.plan
    announce.stage(recipe, position, work)
    timer, skips = StepTimer(), SkipBudget(recipe.loader.max_skipped_fraction)
    examples = ExampleSet(recipe, position.stage, plan, work.encoder)
    with start.open_loader(recipe, position, work) as loader:
        for step in range(position.step, stage.steps):
            batch = next(loader)
            timer.loaded()
            rate = learning_rate(stage.optimizer, step, stage.steps)
            for group in engine.optimizer.param_groups:
                group["lr"] = rate
            result = run_step(engine, batch, len(plan.source_names))
            done = Position(position.stage, step + 1)
            tracker.log(step_record(recipe, plan.source_names, done, rate, result, timer.stepped()))
            check_finite(result.loss, result.grad_norm, done)
            skips.add(result.skipped_samples, result.samples)
            saver.poll()
            if examples.is_due(done.step):
                rows = examples.answer(engine)
                tracker.log_examples(done.stage, global_step(recipe, done), rows)
            stopping = stop_requested()
            if stopping or saver.is_due(done.step, stage.steps):
                saver.save(engine, start.run_state(recipe, work, done, tracker.run_id))
            if stopping:
                return done.step < stage.steps or position.stage != recipe.schedule[-1]
    return False


def check_finite(loss: float, grad_norm: float, done: Position) -> None:
    """Both numbers are the same on every rank, so all ranks stop together.

    Raises:
        TrainingError: one of them is not a number, or infinite.
    """
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    raise TrainingError(
        f"stage={done.stage} step={done.step}: loss={loss} grad_norm={grad_norm}; nothing was saved after "
        "this step: lower the stage's optimizer.lr, or look at the step's samples"
    )
