"""Sums a message over all ranks: does the sum arrive, is it correct, and how fast is it?"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from nvlm_train.doctor.finding import Findings, error, ok
from nvlm_train.doctor.rendezvous import World, first_line, silent_ranks

if TYPE_CHECKING:
    from torch.distributed import Store

_MESSAGE_BYTES = 16 * 2**20


@dataclass(frozen=True)
class _Result:
    """Says how the sum went on one rank."""

    seconds: float
    problem: str
    """Empty when the sum is correct."""


def all_reduce(store: Store, world: World, seconds: float) -> None:
    """Sums a message over all ranks in a thread, which may hang, and writes the result to the store.

    Args:
        store: where ranks exchange results.
        world: this rank's place.
        seconds: how long to wait for the sum.
    """
    thread = threading.Thread(target=_sum, args=(store, world, seconds), daemon=True)
    thread.start()
    thread.join(seconds)


def _sum(store: Store, world: World, seconds: float) -> None:
    import torch
    from torch import distributed as dist

    from nvlm_train.parallel.topology import place_in_world

    try:
        place = place_in_world(os.environ, torch.cuda.is_available())
        if place.device is not None:
            torch.cuda.set_device(place.device)
        dist.init_process_group(
            place.backend,
            store=dist.PrefixStore("sum", store),
            rank=world.rank,
            world_size=world.size,
            timeout=timedelta(seconds=seconds),
            device_id=place.device,
        )
        message = torch.ones(_MESSAGE_BYTES // 4, device=place.device or "cpu")
        dist.all_reduce(message)  # the first one connects
        start = time.perf_counter()
        dist.all_reduce(message)
        total = float(message[-1])  # waits for the device
        took = time.perf_counter() - start
        wrong = "" if total == world.size**2 else f"the sum is {total}, not {world.size**2}"
        dist.destroy_process_group()
    except (RuntimeError, OSError) as problem:
        took, wrong = 0.0, first_line(problem)
    store.set(f"reduced/{world.rank}", json.dumps(asdict(_Result(took, wrong))))


def reduced(
    store: Store, world: World, hosts: Mapping[int, str], backend: str, seconds: float
) -> Findings:
    """Reports on rank 0 how the sum went on every rank.

    Args:
        store: where ranks have written their results.
        world: the ranks.
        hosts: name of each rank's host.
        backend: is named in the findings.
        seconds: how long to wait for a rank's result.
    """
    silent = silent_ranks(store, "reduced", range(world.size), seconds)
    results = {
        rank: _Result(**json.loads(store.get(f"reduced/{rank}")))
        for rank in range(world.size)
        if rank not in silent
    }
    failed = {rank: result.problem for rank, result in results.items() if result.problem}
    remedy = (
        "NCCL_DEBUG=INFO says more; name the interface: NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME"
    )
    if silent:
        names = ", ".join(f"{rank} on {hosts[rank]}" for rank in silent[:16])
        yield error(
            "all_reduce", f"{backend}: not done after {seconds:.0f} s on ranks: {names}", remedy
        )
    for rank, problem in failed.items():
        yield error("all_reduce", f"{backend}: rank {rank} on {hosts[rank]}: {problem}", remedy)
    if silent or failed:
        return
    slowest = max(result.seconds for result in results.values())
    # In a ring all-reduce each byte passes twice through every rank but one.
    rate = 2 * (world.size - 1) / world.size * _MESSAGE_BYTES / max(slowest, 1e-9)
    text = f"{backend} over {world.size} rank(s): {_MESSAGE_BYTES // 2**20} MiB in {slowest:.3f} s"
    yield ok("all_reduce", f"{text} ({rate / 1e9:.2f} GB/s bus)")
