"""A pool of processes that run real megatron-core on gloo, kept alive over many layouts.

Importing megatron-core takes 4 s a process; joining a world takes milliseconds. Each call forms a
world of the first `world_size` workers, runs a module-level function on each, and takes it apart.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


class WorkerPool:
    """Processes 0 .. size - 1; `run` returns what the function returned on each rank."""

    def __init__(self, size: int = 4) -> None:
        context = mp.get_context("spawn")
        self._connections: list[Connection] = []
        self._processes = []
        for _ in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            self._connections.append(ours)
            self._processes.append(process)

    def run(self, world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 180) -> list[Any]:
        """Runs `function(*args)` on every rank of a new world.

        Raises:
            AssertionError: a rank failed (with its traceback) or did not answer in time.
        """
        with tempfile.TemporaryDirectory() as directory:
            store = os.path.join(directory, "store")
            members = self._connections[:world_size]
            for rank, connection in enumerate(members):
                connection.send((rank, world_size, store, function, args))
            answers = []
            for rank, connection in enumerate(members):
                assert connection.poll(timeout), f"rank {rank} did not answer in {timeout} s"
                answers.append(connection.recv())
        errors = [answer for ok, answer in answers if not ok]
        assert not errors, "\n".join(errors)
        return [answer for _, answer in answers]

    def close(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            process.terminate()
            process.join()


def _serve(connection: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    while True:
        rank, world_size, store, function, args = connection.recv()
        try:
            connection.send((True, _run(rank, world_size, store, function, args)))
        except BaseException:
            connection.send((False, f"rank {rank}:\n{traceback.format_exc()}"))


def _run(rank: int, world_size: int, store: str, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    import torch.distributed as dist

    from nvlm_train.parallel.topology import start_process_group

    dist.init_process_group(
        "gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size
    )
    try:
        start_process_group()
        return function(*args)
    finally:
        from megatron.core import parallel_state

        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
