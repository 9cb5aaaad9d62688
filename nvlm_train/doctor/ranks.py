"""Checks that all ranks find each other, have the same versions and clocks, and can sum a tensor in time.

Every rank first writes `here` to the rendezvous store. So a rank that never started is named, instead of
all others waiting for it in a collective. A rank that does not finish the all-reduce is named as well.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from nvlm_train.doctor.all_reduce import all_reduce, reduced
from nvlm_train.doctor.finding import Findings, error, ok, warning
from nvlm_train.doctor.machine import versions
from nvlm_train.doctor.rendezvous import World, absent, agent_listens, first_line, silent_ranks

if TYPE_CHECKING:
    from torch.distributed import Store

CLOCK_SECONDS = 1.0
"""Difference of two hosts' clocks from which on a warning is given."""
_FAREWELL_SECONDS = 5.0
_PREFIX = "nvlm_doctor"


@dataclass(frozen=True)
class _Here:
    """Holds what a rank says about itself."""

    host: str
    versions: dict[str, str]
    device: str


def check_ranks(world: World, seconds: float) -> Findings:
    """Checks the ranks together. Called by every rank; rank 0's findings are the ones to show.

    Args:
        world: this rank's place.
        seconds: how long to wait for a silent rank, at the start and in the all-reduce.
    """
    from torch import distributed as dist

    try:
        server = dist.TCPStore(
            world.address,
            world.port,
            is_master=world.rank == 0 and not agent_listens(),
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
        )
    except (dist.DistError, OSError) as problem:
        yield error(
            "rendezvous",
            f"rank {world.rank}: nothing answers at {world.address}:{world.port} ({first_line(problem)})",
            "start rank 0 first; look at firewalls between the nodes and at MASTER_ADDR",
        )
        return
    store = dist.PrefixStore(_PREFIX, server)
    store.set(f"here/{world.rank}", json.dumps(asdict(_here())))
    everyone = range(world.size)
    if world.rank:
        if absent(store, ["go"], 10 * seconds):
            text = f"rank {world.rank}: rank 0 did not say go in {10 * seconds:.0f} s"
            yield error("ranks", text, "look at rank 0's lines")
            return
        if store.get("go") == b"yes":
            _answer_clock(store, world.rank, seconds)
            all_reduce(store, world, seconds)
            absent(store, ["bye"], seconds)
            store.set(f"left/{world.rank}", "")
        return
    silent = silent_ranks(store, "here", everyone, seconds)
    store.set("go", "no" if silent else "yes")
    if silent:
        yield error(
            "ranks",
            f"{len(silent)} of {world.size} ranks are silent after {seconds:.0f} s: {_names(silent)}",
            "look at their logs and hosts; every rank must reach MASTER_ADDR and MASTER_PORT",
        )
        return
    found = {rank: _Here(**json.loads(store.get(f"here/{rank}"))) for rank in everyone}
    yield from _compare(found)
    yield from _clocks(store, found, seconds)
    all_reduce(store, world, seconds)
    hosts = {rank: each.host for rank, each in found.items()}
    backend = "gloo" if found[0].device == "cpu" else "NCCL"
    yield from reduced(store, world, hosts, backend, seconds)
    store.set("bye", "")
    # The store ends with this rank, so it waits for the others to have read the last word.
    silent_ranks(store, "left", everyone[1:], min(seconds, _FAREWELL_SECONDS))


def _here() -> _Here:
    import torch

    local = int(os.environ.get("LOCAL_RANK", "0"))
    if not torch.cuda.is_available():
        return _Here(socket.gethostname(), versions(), "cpu")
    count = torch.cuda.device_count()
    name = torch.cuda.get_device_name(local) if local < count else f"missing: {count} GPU(s)"
    return _Here(socket.gethostname(), versions(), name)


def _names(ranks: Sequence[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:16])
    return shown if len(ranks) <= 16 else f"{shown} and {len(ranks) - 16} more"


def _compare(found: dict[int, _Here]) -> Findings:
    """Checks that all ranks have the same libraries, and that each has its device."""
    hosts = Counter(each.host for each in found.values())
    yield ok("ranks", f"{len(found)} rank(s) on {len(hosts)} host(s), all here")
    first = found[0]
    for rank, each in found.items():
        other = [name for name in first.versions if each.versions[name] != first.versions[name]]
        if other:
            shown = ", ".join(f"{n}={each.versions[n]}, not {first.versions[n]}" for n in other)
            remedy = "use one environment or container image everywhere"
            yield error("ranks", f"rank {rank} on {each.host} has {shown}", remedy)
        if each.device.startswith("missing") or (each.device == "cpu") != (first.device == "cpu"):
            yield error(
                "ranks",
                f"rank {rank} on {each.host}: device {each.device}; rank 0 has {first.device}",
                "start as many processes a node as it has GPUs",
            )


def _clocks(store: Store, found: dict[int, _Here], seconds: float) -> Findings:
    """Measures the offset of each host's clock from rank 0's. Its uncertainty is half a round trip."""
    firsts = {each.host: rank for rank, each in reversed(found.items())}
    store.set("timekeepers", json.dumps(sorted(firsts.values())))
    worst, agree = 0.0, True
    for host, rank in sorted(firsts.items(), key=lambda item: item[1]):
        if rank == 0:
            continue
        sent = time.time()
        store.set(f"ping/{rank}", "")
        if absent(store, [f"pong/{rank}"], seconds):
            agree = False
            yield error("clocks", f"rank {rank} on {host} does not answer", "look at its log")
            continue
        received = time.time()
        offset = float(store.get(f"pong/{rank}")) - (sent + received) / 2
        certain = max(0.0, abs(offset) - (received - sent) / 2)
        worst = max(worst, certain)
        if certain > CLOCK_SECONDS:
            agree = False
            yield warning(
                "clocks",
                f"the clock of {host} is {offset:+.1f} s off rank 0's",
                "run chrony or ntpd on all nodes: logs and the order of checkpoints go by the clock",
            )
    if agree:
        text = f"{len(firsts)} host(s) agree to {CLOCK_SECONDS:.0f} s (worst certain {worst:.3f} s)"
        yield ok("clocks", text)


def _answer_clock(store: Store, rank: int, seconds: float) -> None:
    if rank in json.loads(store.get("timekeepers")) and not absent(
        store, [f"ping/{rank}"], seconds
    ):
        store.set(f"pong/{rank}", repr(time.time()))
