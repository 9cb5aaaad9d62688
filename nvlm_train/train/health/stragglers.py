"""Finds stragglers: the rank that makes the others wait.

In a synchronous step all ranks take equally long. They differ in how much of that time they wait for
others. A rank's own time is the step without that wait. Once in `straggler_interval_steps` steps one
small collective compares the own times.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist

from nvlm_train.config.schema import HealthConfig
from nvlm_train.parallel.topology import Topology, device
from nvlm_train.parallel.waiting import waited
from nvlm_train.train.tracking.step_record import StepSeconds

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankTimes:
    """Holds the mean seconds per step of one rank, by what it did."""

    rank: int
    pp_stage: int
    data: float
    """Waiting for the rank's own loader."""
    compute: float
    """Neither waiting for the loader nor for other ranks."""
    wait: float
    """Waiting for other ranks, as far as the host knows (parallel/waiting.py)."""

    @property
    def own(self) -> float:
        return self.data + self.compute


@dataclass(frozen=True)
class Slowest:
    """Names the rank whose own time is the largest multiple of its peers' median."""

    times: RankTimes
    peers: RankTimes
    """Medians of the other ranks of its pipeline stage, or of all other ranks when it is alone there."""

    @property
    def ratio(self) -> float:
        return self.times.own / max(self.peers.own, 1e-9)


@dataclass(frozen=True)
class SlowestRank:
    """A step writes these fields when ranks were compared: once in `health.straggler_interval_steps`
    steps, where there is more than one rank. Times are means over the steps since the last comparison."""

    slowest_rank: int
    """This rank's own time is the largest multiple of its peers' (the other ranks of its pipeline stage,
    or all others where it has none). [rank]"""
    slowest_rank_ratio: float
    """Its own time, without waiting for other ranks, is this many times its peers' median. [times]"""
    slowest_rank_data_seconds: float
    """It took this long for its own data in a step. [seconds]"""
    slowest_rank_compute_seconds: float
    """It neither waited nor loaded for this long in a step. [seconds]"""
    slowest_rank_wait_seconds: float
    """It was blocked on other ranks for this long in a step, as far as its host knows. [seconds]"""
    slowest_rank_peers_seconds: float
    """Its peers' own time in a step has this median. [seconds]"""


def slowest(ranks: Sequence[RankTimes]) -> Slowest:
    """Compares each rank with those of its pipeline stage, because stages are never quite equal."""
    return max((Slowest(each, _peers(each, ranks)) for each in ranks), key=lambda one: one.ratio)


def _peers(rank: RankTimes, ranks: Sequence[RankTimes]) -> RankTimes:
    others = [each for each in ranks if each.rank != rank.rank]
    peers = [each for each in others if each.pp_stage == rank.pp_stage] or others or [rank]
    data, compute, wait = (
        median(getattr(each, part) for each in peers) for part in ("data", "compute", "wait")
    )
    return RankTimes(-1, rank.pp_stage, data, compute, wait)


class StragglerReport:
    """Adds up the parts of this rank's steps, and compares ranks every `straggler_interval_steps` steps."""

    def __init__(self, config: HealthConfig) -> None:
        self._config = config
        self._suspect, self._times_in_a_row = -1, 0
        self._restart()

    def _restart(self) -> None:
        self._steps, self._data, self._total, self._waited_before = 0, 0.0, 0.0, waited()

    def add(self, seconds: StepSeconds, topology: Topology) -> dict[str, float | int]:
        """Takes a step's seconds. Called by every rank after every step.

        Returns:
            What goes into the step's record: nothing, or the result of the comparison.
        """
        self._steps += 1
        self._data += seconds.loading
        self._total += seconds.total
        if self._steps < self._config.straggler_interval_steps:
            return {}
        wait = waited() - self._waited_before
        compute = max(self._total - self._data - wait, 0.0)
        sums = torch.tensor([self._data, compute, wait], dtype=torch.float32, device=device())
        table = _gather(sums / self._steps, topology)
        self._restart()
        if topology.world_size == 1:
            return {}
        worst = slowest(table)
        self._warn(worst)
        record = SlowestRank(
            slowest_rank=worst.times.rank,
            slowest_rank_ratio=worst.ratio,
            slowest_rank_data_seconds=worst.times.data,
            slowest_rank_compute_seconds=worst.times.compute,
            slowest_rank_wait_seconds=worst.times.wait,
            slowest_rank_peers_seconds=worst.peers.own,
        )
        return dict(vars(record))

    def _warn(self, worst: Slowest) -> None:
        is_slow = worst.ratio >= self._config.straggler_threshold
        again = is_slow and worst.times.rank == self._suspect
        self._times_in_a_row = (self._times_in_a_row + 1 if again else 1) if is_slow else 0
        self._suspect = worst.times.rank if is_slow else -1
        if self._times_in_a_row >= self._config.straggler_patience and dist.get_rank() == 0:
            logger.warning("%s", describe(worst, self._times_in_a_row, self._config))


def _gather(parts: torch.Tensor, topology: Topology) -> list[RankTimes]:
    """Returns the times of all ranks, by rank. `parts` is fp32 [3]: data, compute and wait."""
    place = torch.tensor([topology.pipeline_rank], dtype=torch.float32, device=parts.device)
    own = torch.cat([place, parts])
    table = own.new_empty(topology.world_size * len(own))
    dist.all_gather_into_tensor(table, own)
    rows = table.view(topology.world_size, len(own)).tolist()
    return [
        RankTimes(rank, int(pp_stage), data, compute, wait)
        for rank, (pp_stage, data, compute, wait) in enumerate(rows)
    ]


def describe(worst: Slowest, times_in_a_row: int, config: HealthConfig) -> str:
    """Returns the warning about a straggler: how slow it is, and where to look."""
    times, peers = worst.times, worst.peers
    loads = times.data - peers.data > times.compute - peers.compute
    cause = (
        "it waits for its data: look at its storage and CPUs, or raise loader.workers"
        if loads
        else "it computes longer: look at its clocks, temperature, ECC errors and other processes"
    )
    return (
        f"straggler: rank {times.rank} needs {times.own:.3g} s a step of its own, {worst.ratio:.2f} x its "
        f"peers' {peers.own:.3g} s (data {times.data:.3g} s, theirs {peers.data:.3g} s; compute "
        f"{times.compute:.3g} s, theirs {peers.compute:.3g} s), in {times_in_a_row} comparisons of "
        f"{config.straggler_interval_steps} steps in a row; {cause}"
    )
