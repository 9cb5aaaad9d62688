"""The train loop: runs the schedule's stages, and the steps of one stage."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from nvlm_train.config import rules
from nvlm_train.config.schema import Recipe
from nvlm_train.parallel.streams import training_stream
from nvlm_train.parallel.topology import process_group
from nvlm_train.train import placing, run_lock, start
from nvlm_train.train.checkpoint.run_state import Run
from nvlm_train.train.checkpoint.saver import Saver
from nvlm_train.train.health import memory
from nvlm_train.train.health.collectives import record_collectives
from nvlm_train.train.health.health import Health
from nvlm_train.train.schedule import Position, global_step, learning_rate, stages_to_run
from nvlm_train.train.signals import EXIT_REQUEUE, StopRequest
from nvlm_train.train.step import SkipBudget, run_step
from nvlm_train.train.tracking import announce
from nvlm_train.train.tracking.examples import ExampleSet
from nvlm_train.train.tracking.step_record import StepTimer, step_record
from nvlm_train.train.tracking.tracker import Tracker

logger = logging.getLogger(__name__)


def train(recipe: Recipe) -> int:
    """Runs the schedule to its end, from the newest checkpoint in the run directory. Called by every rank.

    Returns:
        0 when the schedule is finished, EXIT_REQUEUE when a signal stopped it after a save.

    Raises:
        NvlmError: something that the user has to fix, or that keeps training from going on.
    """
    record_collectives()
    with process_group(), training_stream():
        rules.check(recipe, dist.get_world_size())
        announce.machine(recipe.precision)
        announce.model(recipe)
        with run_lock.held(Path(recipe.run_dir)):
            return run_schedule(recipe)


def run_schedule(recipe: Recipe) -> int:
    """Runs the unfinished stages. The caller holds the run directory."""
    stop, run = StopRequest(), start.open_run(recipe)
    if next(stages_to_run(recipe, run.position), None) is None:
        announce.finished(recipe, run)
    steps_done = global_step(recipe, run.position) if run.position else 0
    run_id = run.state.wandb_run_id if run.state else None
    saver = Saver(Path(recipe.run_dir), recipe.checkpoint)
    with Tracker(recipe, run_id, steps_done) as tracker, Health(recipe) as health:
        # After each stage, and after a rollback inside one, the run directory says where to go on.
        while position := next(stages_to_run(recipe, run.position), None):
            tracker.rewind(global_step(recipe, position))
            with memory.explained(recipe, position.stage):
                stopped = run_stage(recipe, position, run, tracker, saver, stop.agreed, health)
            with health.busy("saving"):
                saver.wait()
            if stopped:
                logger.info("stopped by a signal and saved; the same command goes on")
                return EXIT_REQUEUE
            run = start.open_run(recipe)
        saver.close()
    return 0


def run_stage(
    recipe: Recipe,
    position: Position,
    run: Run,
    tracker: Tracker,
    saver: Saver,
    stop_requested: Callable[[], bool],
    health: Health,
) -> bool:
    """Trains one stage from `position`, until it ends, is stopped or is rolled back.

    Args:
        recipe: the whole recipe.
        position: where the stage starts.
        run: the checkpoint that the stage starts from, if there is one.
        tracker: receives a record of every step.
        saver: saves checkpoints.
        stop_requested: returns whether some rank got a signal; called by all ranks together.
        health: watches the steps, and says when to go back to the last checkpoint.

    Returns:
        Whether a signal stopped the run before its end.
    """
    stage, left_out = recipe.stages[position.stage], health.start_stage(position)
    work = start.start_stage(recipe, position, run)
    engine, plan = work.engine, work.plan
    announce.stage(recipe, position, work)
    timer, skips = (
        StepTimer(engine.parts, engine.features),
        SkipBudget(recipe.loader.max_skipped_fraction),
    )
    examples = ExampleSet(recipe, position.stage, plan, work.encoder)
    with start.open_loader(recipe, position, work, left_out) as loader:
        for batch in placing.ahead(loader, engine.topology, engine.features):
            timer.loaded()
            rate = learning_rate(stage.optimizer, batch.step, stage.steps)
            engine.set_learning_rate(rate)
            result = run_step(engine, batch, len(plan.source_names))
            done = Position(position.stage, batch.step + 1)
            seconds = timer.stepped()
            record = step_record(recipe, plan.source_names, done, rate, result, seconds)
            tracker.log({**record, **health.stepped(done, result, seconds, work)})
            if health.must_roll_back(done, result, work):
                with health.busy("saving"):
                    saver.wait()
                health.leave_out(done, result, start.open_run(recipe).position)
                return False
            skips.add(result.skipped_samples, result.samples)
            saver.poll()
            if examples.is_due(done.step):
                rows = examples.answer(engine)
                tracker.log_examples(done.stage, global_step(recipe, done), rows)
            stopping = stop_requested()
            if stopping or saver.is_due(done.step, stage.steps):
                with health.busy("saving"):
                    saver.save(engine, start.run_state(recipe, work, done, tracker.run_id))
            if stopping:
                return done.step < stage.steps or position.stage != recipe.schedule[-1]
    return False
