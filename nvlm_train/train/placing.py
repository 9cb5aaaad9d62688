"""Brings steps to the device ahead of their training."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from nvlm_train.batch import StepBatch
from nvlm_train.device_batch import DeviceStep
from nvlm_train.parallel.streams import SideStream
from nvlm_train.parallel.topology import Topology
from nvlm_train.pipeline.placing import place_step
from nvlm_train.vision.ahead import FeatureSource

logger = logging.getLogger(__name__)


def ahead(
    batches: Iterable[StepBatch], topology: Topology, features: FeatureSource
) -> Iterator[DeviceStep]:
    """Places steps, on a GPU each while the one before it trains, and lets their rounds be encoded ahead.

    Without a GPU there is nothing to hide, and a step is placed when it is asked for.
    """
    if not features.side.is_beside:
        yield from (place(batch, topology) for batch in batches)
        return
    waiting: _Placed | None = None
    for batch in batches:
        with features.side.at_once():
            placed = _Placed(place(batch, topology), features.side.mark())
        features.expect(placed.step.rounds)
        if waiting is not None:
            yield _handed_over(waiting, features.side)
        waiting = placed
    if waiting is not None:
        yield _handed_over(waiting, features.side)


@dataclass(frozen=True)
class _Placed:
    step: DeviceStep
    mark: Any
    """The side stream's, behind the copies."""


def place(batch: StepBatch, topology: Topology) -> DeviceStep:
    """Places a step, and says in the log which of its samples this rank could not decode."""
    first, skipped = _first_samples(batch), []
    for failure in batch.failures:
        microbatch = batch.rounds[failure.round].microbatches[failure.microbatch]
        sample = microbatch.samples[failure.sample]
        logger.warning(
            "skipped sample=%s in shard=%s: %s", sample.key, sample.shard, failure.reason
        )
        skipped.append(first[failure.round, failure.microbatch] + failure.sample)
    return place_step(batch, skipped, topology)


def _first_samples(batch: StepBatch) -> dict[tuple[int, int], int]:
    """Returns the number of the first sample of each (round, microbatch), counted through the step."""
    first: dict[tuple[int, int], int] = {}
    total = 0
    for r, round_ in enumerate(batch.rounds):
        for m, microbatch in enumerate(round_.microbatches):
            first[r, m] = total
            total += len(microbatch.samples)
    return first


def _handed_over(placed: _Placed, side: SideStream) -> DeviceStep:
    """Lets the training stream wait for the copies, and keeps their memory until it has used them."""
    step = placed.step
    # All tensors of a step but the pixels are views of one buffer.
    side.wait_for(placed.mark, (step.failed, *(round_.pixels_TCEE for round_ in step.rounds)))
    return step
