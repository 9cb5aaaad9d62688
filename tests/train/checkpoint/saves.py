"""Runs on the workers: saves that are made to fail, and what every rank makes of it."""

from __future__ import annotations

import errno
import logging
import os
import threading
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
import torch.distributed as dist

from nvlm_train.config.schema import Recipe
from nvlm_train.errors import CheckpointError
from nvlm_train.parallel.topology import collect_engines
from nvlm_train.train import start
from nvlm_train.train.checkpoint import directory, sharded_state, writer_threads
from nvlm_train.train.checkpoint.run_state import Run
from nvlm_train.train.checkpoint.saver import Saver
from nvlm_train.train.checkpoint.verify import find_damage
from nvlm_train.train.engine import Engine, StageWork
from nvlm_train.train.optimizer import parts
from nvlm_train.train.placing import place
from nvlm_train.train.schedule import Position
from nvlm_train.train.step import run_step
from tests.train import runs
from tests.train.smoke import smoke_recipe

FIRST = Position("pretrain", 0)


def trained_for_a_step(recipe: Recipe) -> StageWork:
    """Trains a step, so that the optimizer has a state."""
    work = start.start_stage(recipe, FIRST, Run(None, None))
    with start.open_loader(recipe, FIRST, work) as loader:
        run_step(
            work.engine, place(next(loader), work.engine.topology), len(work.plan.source_names)
        )
    return work


def save_with_room_for(
    data: Path, run_dir: Path, rooms: list[int], *overrides: str
) -> list[tuple[str, list[str]]]:
    """Saves once for each number of bytes that the file system has left.

    Returns:
        For each, the error ("" for none) and the names in the directory after it.
    """
    recipe = smoke_recipe(data, run_dir, *overrides)
    work = trained_for_a_step(recipe)
    saver, filler = Saver(run_dir, recipe.checkpoint), run_dir / "filler"
    found = []
    for step, room in enumerate(rooms, 1):
        if dist.get_rank() == 0:
            filler.unlink(missing_ok=True)
            _fill(filler, room)
        dist.barrier()
        found.append(_attempt(saver, work, recipe, Position("pretrain", step), run_dir))
    saver.close()
    return found


def _fill(filler: Path, room: int) -> None:
    usage = os.statvfs(filler.parent)
    with filler.open("wb") as file:
        file.write(bytes(max(usage.f_bavail * usage.f_frsize - room, 0)))


def _attempt(saver, work, recipe, position, run_dir) -> tuple[str, list[str]]:
    message = ""
    try:
        saver.save(work.engine, start.run_state(recipe, work, position, None))
        saver.wait()
    except CheckpointError as error:
        message = str(error)
    dist.barrier()
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    dist.barrier()
    return message, names


def leaves_the_engine(data: Path, run_dir: Path) -> bool:
    """Saves a stage, and returns whether its weights are freed before another stage is saved."""
    recipe = smoke_recipe(data, run_dir)
    work = trained_for_a_step(recipe)
    saver = Saver(run_dir, recipe.checkpoint)
    saver.save(work.engine, start.run_state(recipe, work, Position("pretrain", 1), None))
    saver.wait()
    weight = weakref.ref(next(work.engine.model.module.parameters()))
    del work
    collect_engines()
    is_freed = weight() is None
    saver.close()
    return is_freed


def save_with_a_broken_file(data: Path, run_dir: Path) -> list[str]:
    """Lets a writer of the last rank fail in its file, then saves again. Returns the two errors."""
    recipe = smoke_recipe(data, run_dir)
    work = trained_for_a_step(recipe)
    saver, messages = Saver(run_dir, recipe.checkpoint), []
    original = writer_threads.HashedFile.sync
    for step, victim in ((1, dist.get_world_size() - 1), (2, None)):
        is_broken = dist.get_rank() == victim
        with mock.patch.object(
            writer_threads.HashedFile, "sync", _broken if is_broken else original
        ):
            saver.save(work.engine, start.run_state(recipe, work, Position("pretrain", step), None))
            try:
                saver.wait()
                messages.append("")
            except CheckpointError as error:
                messages.append(str(error))
    saver.close()
    return messages


def _broken(file: writer_threads.HashedFile) -> None:
    raise OSError(errno.EIO, "Input/output error", "a file")


def save_while_training_goes_on(data: Path, run_dir: Path, *overrides: str) -> tuple[int, bool]:
    """Holds the writers back until everything that was to be saved has been overwritten.

    Returns:
        Processes that the save started; whether what was loaded is what there was when it began.
    """
    recipe = smoke_recipe(data, run_dir, *overrides)
    work = trained_for_a_step(recipe)
    saver, may_write = Saver(run_dir, recipe.checkpoint), threading.Event()
    before, children = _snapshot(work.engine), len(psutil.Process().children())
    original = writer_threads._write_file

    def held_back(*arguments: Any) -> Any:
        assert may_write.wait(timeout=60)
        return original(*arguments)

    with mock.patch.object(writer_threads, "_write_file", held_back):
        saver.save(work.engine, start.run_state(recipe, work, Position("pretrain", 1), None))
    started = len(psutil.Process().children()) - children
    # As the next update does.
    work.engine.wait_for_copies()
    for tensor in _live(work.engine):
        tensor.zero_()
    may_write.set()
    saver.close()
    sharded_state.load(work.engine, directory.complete_checkpoints(run_dir)[-1], True)
    after = _snapshot(work.engine)
    return started, all(map(torch.equal, before, after))


def _live(engine: Engine) -> list[torch.Tensor]:
    """Yields weights, and the optimizer's copies and moments."""
    states = [
        value
        for part in parts(engine.optimizer)
        for state in part.optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    groups = (part.optimizer.param_groups for part in parts(engine.optimizer))
    mains = [tensor for each in groups for group in each for tensor in group["params"]]
    weights = [parameter.data for parameter in engine.model.module.parameters()]
    return [tensor.data for tensor in (*weights, *mains, *states) if tensor.numel() > 1]


def _snapshot(engine: Engine) -> list[torch.Tensor]:
    engine.whole_model()
    return [tensor.clone() for tensor in _live(engine)]


def run_and_listen(data: Path, run_dir: Path, *overrides: str) -> tuple[int | str, list[str]]:
    """Trains. Returns the exit code or the error, and what was logged as an error."""
    heard: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("nvlm_train")
    logger.addHandler(handler)
    try:
        return runs.run(data, run_dir, *overrides), heard
    except CheckpointError as error:
        return str(error), heard
    finally:
        logger.removeHandler(handler)


def damage_of(checkpoint: Path) -> list[str]:
    """Returns what every rank finds together."""
    return find_damage(checkpoint)
