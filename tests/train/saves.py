"""Runs on the workers: saves that are made to fail, and what every rank makes of it."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

from nvlm_train.config.schema import Recipe
from nvlm_train.errors import CheckpointError
from nvlm_train.train import start
from nvlm_train.train.checkpoint_writer import die_with, with_digests
from nvlm_train.train.damage import find_damage
from nvlm_train.train.mcore_fixes import ResultFile
from nvlm_train.train.saver import Saver
from nvlm_train.train.schedule import Position
from nvlm_train.train.step import run_step
from tests.train import runs
from tests.train.smoke import smoke_recipe

FIRST = Position("pretrain", 0)


def trained_for_a_step(recipe: Recipe) -> start.StageWork:
    """So that the optimizer has a state."""
    work = start.start_stage(recipe, FIRST, start.Run(None, None))
    with start.open_loader(recipe, FIRST, work) as loader:
        run_step(work.engine, next(loader), len(work.plan.source_names))
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


def save_with_a_killed_writer(data: Path, run_dir: Path) -> list[str]:
    """Kills the writer of the last rank; then saves again. The two errors."""
    recipe = smoke_recipe(data, run_dir)
    work = trained_for_a_step(recipe)
    saver, messages = Saver(run_dir, recipe.checkpoint), []
    for step, victim in ((1, dist.get_world_size() - 1), (2, None)):
        saver.save(work.engine, start.run_state(recipe, work, Position("pretrain", step), None))
        if dist.get_rank() == victim:
            for child in psutil.Process().children():
                child.kill()
        try:
            saver.wait()
            messages.append("")
        except CheckpointError as error:
            messages.append(str(error))
    saver.close()
    return messages


def writer_outlives_its_rank() -> bool:
    """Forks a rank that forks a writer, kills the rank, and looks for the writer for five seconds."""
    reading, writing = os.pipe()
    rank = os.fork()
    if rank == 0:
        own = os.getpid()
        writer = os.fork()
        if writer == 0:
            die_with(own)
            os.write(writing, str(os.getpid()).encode())
        time.sleep(60)
        os._exit(0)
    writer = psutil.Process(int(os.read(reading, 20)))
    os.kill(rank, signal.SIGKILL)
    os.waitpid(rank, 0)
    try:
        writer.wait(timeout=5)
    except psutil.TimeoutExpired:
        writer.kill()
        return True
    return False


class _CollectingResult(ResultFile):
    """Collects garbage in the writer before it reports."""

    def put(self, result: Any) -> None:
        gc.collect()
        super().put(result)


def writer_ends_though_its_rank_left_a_group(directory: Path) -> bool:
    """Forks a writer of one file while a process group of this rank waits to be collected."""
    gc.disable()
    try:
        garbage = [dist.new_group([dist.get_rank()], use_local_synchronization=True)]
        dist.all_reduce(torch.ones(1), group=garbage[0])
        dist.destroy_process_group(garbage[0])
        garbage.append(garbage)
        del garbage
        bucket = (str(directory / "file"), "key", ([], []))
        request = AsyncRequest(partial(Path, []), (), [])
        results = _CollectingResult()
        written = with_digests(request, ResultFile()).async_fn
        writer = multiprocessing.get_context("fork").Process(
            target=written, args=(0, [bucket], results)
        )
        writer.start()
        writer.join(timeout=20)
        writer.kill()
        return results.is_there()
    finally:
        gc.enable()


def run_and_listen(data: Path, run_dir: Path, *overrides: str) -> tuple[int | str, list[str]]:
    """Trains; the exit code or the error, and what was logged as an error."""
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
    """What every rank finds together."""
    return find_damage(checkpoint)
