"""Runs one optimizer step: drop what cannot be decoded, run the rounds, reduce, update.

The loss is the sum over trained tokens divided by their number in the whole step, over all
data-parallel ranks. It is therefore the same for every layout, packing and number of rounds.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from torch import Tensor

from nvlm_train.device_batch import DeviceStep
from nvlm_train.errors import TrainingError
from nvlm_train.parallel.waiting import waiting
from nvlm_train.pipeline.loss import LabelLosses, training_loss
from nvlm_train.pipeline.round import run_round
from nvlm_train.train.engine import Engine
from nvlm_train.train.optimizer import gradient_norm, update
from nvlm_train.train.reduce_metrics import StepResult, count_trained_tokens, reduce_step


def run_step(engine: Engine, batch: DeviceStep, num_sources: int) -> StepResult:
    """Trains on one step's batch. Called by every rank; the learning rate must have been set.

    The host reads the device twice: the gradient norm, which decides about the update, and at the end what
    is reported. Everything else is in the queue before.

    When the loss or the gradient norm is not finite on some rank, no rank changes its weights or its
    optimizer.

    Args:
        engine: this rank's model, encoder and optimizer.
        batch: this rank's view of the step, on the device.
        num_sources: sources of the stage's blend, for losses per source.

    Returns:
        What the step did, summed over the world.
    """
    topology = engine.topology
    with waiting():
        if topology.replica_size > 1:
            dist.all_reduce(batch.failed, op=dist.ReduceOp.MAX, group=topology.replica_group)
        trained_tokens = count_trained_tokens(batch, topology)
    engine.model.zero_grad_buffer()
    engine.optimizer.zero_grad()
    label_losses = forward_backward(engine, batch, trained_tokens)
    # Called without a token count, it rescales nothing: the loss was normalised before the backward.
    finalize_model_grads([engine.model])
    with engine.parts.within("optimizer"):
        grad_norm = gradient_norm(engine.optimizer)
    result = reduce_step(batch, label_losses, grad_norm, num_sources, topology)
    if result.is_finite:
        engine.wait_for_copies()
        with engine.parts.within("optimizer"):
            update(engine.optimizer, grad_norm)
    return result


def forward_backward(
    engine: Engine, batch: DeviceStep, trained_tokens: Tensor
) -> list[LabelLosses]:
    """Runs the rounds and accumulates gradients. Their data-parallel reduction starts in the last round.

    Returns:
        On the last pipeline stage the losses by label of this rank's packs; elsewhere an empty
        list.
    """
    engine.model.begin_gather()
    finish = engine.parts.timed(training_loss(trained_tokens, batch.failed))
    losses: list[LabelLosses] = []
    for round_ in batch.rounds[:-1]:
        with _without_gradient_sync(engine):
            losses += run_round(engine.replica, round_, finish, forward_only=False)
    engine.model.module.config.no_sync_func = engine.model.no_sync
    losses += run_round(engine.replica, batch.rounds[-1], finish, forward_only=False)
    engine.model.check_gathered()
    return losses


@contextlib.contextmanager
def _without_gradient_sync(engine: Engine) -> Iterator[None]:
    """Keeps the schedule from starting the reduction after its last microbatch, as it otherwise does."""
    engine.model.module.config.no_sync_func = contextlib.nullcontext
    with engine.model.no_sync():
        yield


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
