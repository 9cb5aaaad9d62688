"""Brings steps to the device ahead of their training."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

import torch

from nvlm_train.batch import StepBatch
from nvlm_train.device_batch import DeviceStep
from nvlm_train.parallel.topology import Topology
from nvlm_train.pipeline.placing import place_step

logger = logging.getLogger(__name__)


def ahead(batches: Iterable[StepBatch], topology: Topology) -> Iterator[DeviceStep]:
    """Places steps, on a GPU each while the one before it trains, on a stream of its own.

    Without a GPU there is nothing to hide, and a step is placed when it is asked for.
    """
    if not torch.cuda.is_available():
        yield from (place(batch, topology) for batch in batches)
        return
    stream = torch.cuda.Stream()
    waiting: DeviceStep | None = None
    for batch in batches:
        with torch.cuda.stream(stream):
            placed = place(batch, topology)
        if waiting is not None:
            yield _handed_over(waiting, stream)
        waiting = placed
    if waiting is not None:
        yield _handed_over(waiting, stream)


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


def _handed_over(step: DeviceStep, stream: torch.cuda.Stream) -> DeviceStep:
    """Lets the training stream wait for the copies, and keeps their memory until it has used them."""
    now = torch.cuda.current_stream()
    now.wait_stream(stream)
    for tensor in (step.failed, *(round_.pixels_TCEE for round_ in step.rounds)):
        # All tensors of a step but the pixels are views of one buffer.
        tensor.record_stream(now)
    return step
