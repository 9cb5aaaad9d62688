"""A pool of processes that run real megatron-core, kept alive over many layouts: on gloo, or one on a GPU.

Importing megatron-core takes 4 s a process; joining a world takes milliseconds. Each call forms a
world of the first `world_size` workers, runs a module-level function on each, and takes it apart.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing as mp
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

WITHOUT_GPU = {"CUDA_VISIBLE_DEVICES": ""}
"""Environment of processes that find no GPU where there is one."""


class WorkerPool:
    """Keeps processes 0 .. size - 1. `run` returns what the function returned on each rank.

    Args:
        size: of the largest world.
        environment: variables that the processes see in addition.
    """

    def __init__(self, size: int = 4, environment: Mapping[str, str] = WITHOUT_GPU) -> None:
        self._size = size
        self._environment = environment
        self._start()

    def _start(self) -> None:
        context = mp.get_context("spawn")
        self._connections: list[Connection] = []
        self._processes = []
        for _ in range(self._size):
            ours, theirs = context.Pipe()
            # Not daemons: saving a checkpoint starts processes of its own.
            process = context.Process(target=_serve, args=(theirs,))
            with mock.patch.dict(os.environ, self._environment):
                process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def run(
        self, world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 300
    ) -> list[Any]:
        """Runs `function(*args)` on every rank of a new world.

        Raises:
            AssertionError: a rank failed (with its traceback) or did not answer in time; the
                processes are then replaced, because the others may wait for it in a collective.
        """
        with tempfile.TemporaryDirectory() as directory:
            store = os.path.join(directory, "store")
            members = self._connections[:world_size]
            for rank, connection in enumerate(members):
                connection.send((rank, world_size, store, function, args))
            answers, errors = self._collect(members, timeout)
        if errors:
            self.close()
            self._start()
        assert not errors, "\n".join(errors)
        return answers

    def _collect(self, members: list[Connection], timeout: float) -> tuple[list[Any], list[str]]:
        answers, errors = [], []
        for rank, connection in enumerate(members):
            # Once a rank has failed, the others get only long enough to say how they failed.
            if not connection.poll(2 if errors else timeout):
                if not errors:
                    self._show_stacks()
                errors.append(f"rank {rank} did not answer in {timeout} s")
                continue
            try:
                is_ok, answer = connection.recv()
            except EOFError:
                is_ok, answer = False, f"rank {rank} died"
            (answers if is_ok else errors).append(answer)
        return answers, errors

    def _show_stacks(self) -> None:
        # On stderr, which pytest shows: the stacks are all that is left of a rank that hangs.
        for process in self._processes:
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, signal.SIGUSR2)
        time.sleep(1)

    def close(self) -> None:
        """Ends the processes."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.kill()
            process.join()


def _serve(connection: Connection) -> None:
    import torch

    from nvlm_train.parallel import cpu

    faulthandler.register(signal.SIGUSR2)
    torch.set_num_threads(1)
    cpu.install()
    known: set[str] = set()
    while True:
        try:
            rank, world_size, store, function, args = connection.recv()
        except EOFError:  # the pool was closed
            return
        try:
            connection.send((True, _run(rank, world_size, store, function, args)))
        except BaseException:
            connection.send((False, f"rank {rank}:\n{traceback.format_exc()}"))
        if function.__module__ not in known:
            # What it imported stays: collections after later calls need not walk through all of it.
            known.add(function.__module__)
            gc.freeze()


def _run(
    rank: int, world_size: int, store: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> Any:
    import torch
    import torch.distributed as dist

    from nvlm_train.parallel.topology import (
        collect_engines,
        place_in_world,
        start_process_group,
    )

    place = place_in_world({}, torch.cuda.is_available())
    if place.device is not None:
        torch.cuda.set_device(place.device)
    dist.init_process_group(
        place.backend,
        store=dist.FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
        device_id=place.device,
    )
    try:
        start_process_group()
        # A rank whose function ends at once must not leave while others still connect to it.
        dist.barrier()
        return function(*args)
    finally:
        from megatron.core import parallel_state

        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        # Engines hold the world's groups, each with its threads, until they are collected.
        collect_engines()
