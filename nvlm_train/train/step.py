"""Runs one optimizer step: drop what cannot be decoded, run the rounds, reduce, update.

The loss is the sum over trained tokens divided by their number in the whole step, over all
data-parallel ranks. It is therefore the same for every layout, packing and number of rounds.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads

from nvlm_train.batch import StepBatch
from nvlm_train.errors import TrainingError
from nvlm_train.parallel.topology import Topology, device
from nvlm_train.parallel.waiting import waiting
from nvlm_train.pipeline.loss import LabelLosses, loss_head
from nvlm_train.pipeline.round import run_round
from nvlm_train.train.engine import Engine
from nvlm_train.train.optimizer import gradient_norm, update
from nvlm_train.train.reduce_metrics import StepResult, count_trained_tokens, reduce_step

logger = logging.getLogger(__name__)


def run_step(engine: Engine, batch: StepBatch, num_sources: int) -> StepResult:
    """Trains on one step's batch. Called by every rank; the learning rate must have been set.

    When the loss or the gradient norm is not finite on some rank, no rank changes its weights or its
    optimizer.

    Args:
        engine: this rank's model, encoder and optimizer.
        batch: this rank's view of the step.
        num_sources: sources of the stage's blend, for losses per source.

    Returns:
        What the step did, summed over the world.
    """
    topology = engine.topology
    with waiting():
        batch, skipped = drop_failures(batch, topology)
        trained_tokens = count_trained_tokens(batch, topology)
    engine.model.zero_grad_buffer()
    engine.optimizer.zero_grad()
    label_losses = forward_backward(engine, batch, trained_tokens)
    # Called without a token count, it rescales nothing: the loss was normalised before the backward.
    finalize_model_grads([engine.model])
    with engine.parts.within("optimizer"):
        grad_norm = gradient_norm(engine.optimizer)
    result = reduce_step(batch, label_losses, grad_norm, skipped, num_sources, topology)
    if result.is_finite:
        with engine.parts.within("optimizer"):
            update(engine.optimizer, grad_norm)
    return result


def forward_backward(engine: Engine, batch: StepBatch, trained_tokens: int) -> list[LabelLosses]:
    """Runs the rounds and accumulates gradients. Their data-parallel reduction starts in the last round.

    Returns:
        On the last pipeline stage the losses by label of this rank's microbatches; elsewhere an empty
        list.
    """
    engine.model.begin_gather()
    head = engine.parts.timed(loss_head(trained_tokens))
    losses: list[LabelLosses] = []
    for round_ in batch.rounds[:-1]:
        with _without_gradient_sync(engine):
            losses += run_round(engine.replica, round_, head, forward_only=False)
    engine.model.module.config.no_sync_func = engine.model.no_sync
    losses += run_round(engine.replica, batch.rounds[-1], head, forward_only=False)
    engine.model.check_gathered()
    return losses


@contextlib.contextmanager
def _without_gradient_sync(engine: Engine) -> Iterator[None]:
    """Keeps the schedule from starting the reduction after its last microbatch, as it otherwise does."""
    engine.model.module.config.no_sync_func = contextlib.nullcontext
    with engine.model.no_sync():
        yield


def drop_failures(batch: StepBatch, topology: Topology) -> tuple[StepBatch, int]:
    """Removes the labels of samples whose image some rank of the replica could not decode.

    Only the rank that decodes an image knows that it is broken, but the last pipeline stage holds
    the labels. One small all-reduce a step makes all ranks of the replica agree.

    Returns:
        The batch without those labels, and the number of this replica's samples that lost them.
    """
    first, total = _number_samples(batch)
    flags = torch.zeros(total, dtype=torch.int32, device=device())
    for failure in batch.failures:
        sample = (
            batch.rounds[failure.round].microbatches[failure.microbatch].samples[failure.sample]
        )
        logger.warning(
            "skipped sample=%s in shard=%s: %s", sample.key, sample.shard, failure.reason
        )
        flags[first[failure.round, failure.microbatch] + failure.sample] = 1
    if topology.replica_size > 1 and total:
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=topology.replica_group)
    failed = flags.nonzero().flatten().tolist()
    if not failed:
        return batch, 0
    rounds = [
        replace(
            round_,
            microbatches=tuple(
                microbatch.without_labels_of({number - first[r, m] for number in failed})
                for m, microbatch in enumerate(round_.microbatches)
            ),
        )
        for r, round_ in enumerate(batch.rounds)
    ]
    return replace(batch, rounds=tuple(rounds)), len(failed)


def _number_samples(batch: StepBatch) -> tuple[dict[tuple[int, int], int], int]:
    """Numbers the replica's samples from 0, in the order of rounds and microbatches.

    Returns:
        The number of the first sample of each (round, microbatch), and the number of all samples.
    """
    first: dict[tuple[int, int], int] = {}
    total = 0
    for r, round_ in enumerate(batch.rounds):
        for m, microbatch in enumerate(round_.microbatches):
            first[r, m] = total
            total += len(microbatch.samples)
    return first, total


class SkipBudget:
    """Counts drawn and undecodable samples since the process started, and ends a run that has too many.

    Args:
        max_fraction: undecodable samples that are tolerated, as a share of the drawn ones.
    """

    def __init__(self, max_fraction: float) -> None:
        self._max_fraction = max_fraction
        self._drawn = self._skipped = 0

    def add(self, skipped: int, drawn: int) -> None:
        """Adds a step's counts. Both are the same on every rank, so all ranks stop together.

        The number of tolerated samples is rounded up: any tolerance above zero allows one sample.

        Raises:
            TrainingError: more were skipped than the recipe tolerates.
        """
        self._skipped += skipped
        self._drawn += drawn
        allowed = math.ceil(self._max_fraction * self._drawn)
        if self._skipped > allowed:
            raise TrainingError(
                f"{self._skipped} of {self._drawn} samples could not be decoded, "
                f"loader.max_skipped_fraction={self._max_fraction} allows {allowed}; the warnings above name "
                "them: repair the shards, or raise the limit"
            )
