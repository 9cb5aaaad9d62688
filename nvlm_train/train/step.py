"""One optimizer step: encode tiles, run the pipeline schedule, reduce, update.

The loss is the sum over trained tokens divided by their number in the whole step, over all
data-parallel ranks: the same for every layout, packing and number of rounds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from nvlm_train.batch import Microbatch, StepBatch
from nvlm_train.parallel.topology import Topology, device
from nvlm_train.train.engine import Engine
from nvlm_train.vision.tile_parallel import encode_round


@dataclass(frozen=True)
class StepResult:
    """What a step reports; equal on every rank."""

    loss: float
    """Mean over the step's trained tokens."""
    grad_norm: float
    """Before clipping."""
    trained_tokens: int
    source_loss_sums: tuple[float, ...]
    source_tokens: tuple[int, ...]
    failed_samples: int


def run_step(engine: Engine, batch: StepBatch, num_sources: int) -> StepResult:
    """Trains on one step's batch. Called by every rank; the learning rate must have been set.

    Args:
        engine: this rank's model, encoder and optimizer.
        batch: this rank's view of the step.
        num_sources: sources of the stage's blend, for losses per source.
    """
    topology = engine.topology
    batch = drop_failures(batch, topology)
    trained_tokens = _count_trained_tokens(batch, topology)
    engine.model.zero_grad_buffer()
    engine.optimizer.zero_grad()
    label_losses = forward_backward(engine, batch, trained_tokens)
    # With no token count given, nothing is rescaled: the loss was normalised before the backward.
    finalize_model_grads([engine.model])
    _, grad_norm, _ = engine.optimizer.step()
    sums, counts = _sum_by_source(label_losses, num_sources, topology)
    return StepResult(
        loss=sum(sums) / max(trained_tokens, 1),
        grad_norm=float(grad_norm or 0.0),
        trained_tokens=trained_tokens,
        source_loss_sums=tuple(sums),
        source_tokens=tuple(int(count) for count in counts),
        failed_samples=_count_failures(batch, topology),
    )


def drop_failures(batch: StepBatch, topology: Topology) -> StepBatch:
    """Removes the labels of samples whose image some rank of the replica could not decode.

    Only the rank that decodes an image knows that it is broken, but the last pipeline stage holds
    the labels: one small all-reduce a step makes all ranks of the replica agree.
    """
    starts: dict[tuple[int, int], int] = {}
    total = 0
    for r, work in enumerate(batch.rounds):
        for m, microbatch in enumerate(work.microbatches):
            starts[r, m] = total
            total += len(microbatch.samples)
    flags = torch.zeros(total, dtype=torch.int32, device=device())
    for failure in batch.failures:
        flags[starts[failure.round, failure.microbatch] + failure.sample] = 1
    if topology.replica_size > 1 and total:
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=topology.replica_group)
    if not flags.any():
        return batch
    failed = flags.nonzero().flatten().tolist()
    rounds = []
    for r, work in enumerate(batch.rounds):
        microbatches = tuple(
            microbatch.without_labels_of({number - starts[r, m] for number in failed})
            for m, microbatch in enumerate(work.microbatches)
        )
        rounds.append(replace(work, microbatches=microbatches))
    return replace(batch, rounds=tuple(rounds))


def forward_backward(engine: Engine, batch: StepBatch, trained_tokens: int) -> list[LabelLosses]:
    """Runs the schedule round by round, accumulating gradients; data-parallel sync in the last one only.

    Returns:
        Losses by label of this rank's microbatches on the last pipeline stage; empty elsewhere.
    """
    collected: list[LabelLosses] = []
    last = len(batch.rounds) - 1
    for number, work in enumerate(batch.rounds):
        features = encode_round(engine.encoder, work, engine.topology)
        inputs = zip(work.microbatches, features or [None] * len(work.microbatches), strict=True)
        with _gradient_sync(engine, is_last_round=number == last):
            collected += get_forward_backward_func()(
                forward_step_func=partial(_forward_step, trained_tokens=trained_tokens),
                data_iterator=iter(inputs),
                model=[engine.model],
                num_microbatches=len(work.microbatches),
                seq_length=engine.stage.sequence_length,
                micro_batch_size=1,
                forward_only=False,
            )
    return collected


@contextlib.contextmanager
def _gradient_sync(engine: Engine, is_last_round: bool) -> Iterator[None]:
    """Lets the schedule start the gradient reduction after its last microbatch, in the last round only."""
    config = engine.model.module.config
    config.no_sync_func = engine.model.no_sync if is_last_round else contextlib.nullcontext
    with contextlib.nullcontext() if is_last_round else engine.model.no_sync():
        yield


@dataclass(frozen=True)
class LabelLosses:
    """Detached losses of one microbatch: fp32 [L], with the source of each label's sample."""

    losses_L: Tensor
    sources: list[int]


Inputs = Iterator[tuple[Microbatch, Tensor | None]]


def _forward_step(
    inputs: Inputs, model: MegatronModule, trained_tokens: int
) -> tuple[Tensor, partial[tuple[Tensor, Tensor, LabelLosses]]]:
    """megatron-core's forward_step_func: one microbatch through this pipeline stage."""
    microbatch, features = next(inputs)
    positions_L, labels_L, weights_L = _labels(microbatch)
    output = model(
        microbatch.token_ids_S.to(device()),
        microbatch.image_positions.to(device()),
        features,
        microbatch.cu_seqlens.to(device()),
        positions_L,
    )
    return output, partial(
        _loss, microbatch=microbatch, labels_L=labels_L, weights_L=weights_L / trained_tokens
    )


def _labels(microbatch: Microbatch) -> tuple[Tensor, Tensor, Tensor]:
    """Positions, labels and weights. A pack without labels keeps one position of weight zero.

    Its backward then exists, so no pipeline stage and no collective waits for it in vain.
    """
    positions_L = microbatch.label_positions_L.to(device())
    labels_L = microbatch.label_ids_L.to(device())
    if len(positions_L):
        return positions_L, labels_L, torch.ones(len(positions_L), device=device())
    zero = torch.zeros(1, dtype=torch.int64, device=device())
    return zero, zero, torch.zeros(1, device=device())


def _loss(
    logits: Tensor, microbatch: Microbatch, labels_L: Tensor, weights_L: Tensor
) -> tuple[Tensor, Tensor, LabelLosses]:
    """Weighted sum of cross-entropies, [L, 1, V / TP] to a scalar, in fp32."""
    losses_L = vocab_parallel_cross_entropy(logits.float(), labels_L[:, None])[:, 0]
    samples = microbatch.samples
    sources = [samples[index].source for index in microbatch.label_samples_L.tolist()]
    report = LabelLosses(losses_L.detach()[: len(sources)], sources)
    count = torch.tensor(len(sources), dtype=torch.int)
    return (losses_L * weights_L).sum(), count, report


def _count_trained_tokens(batch: StepBatch, topology: Topology) -> int:
    """Trained tokens of the whole step, over all data-parallel ranks; at least 1, as it divides."""
    own = sum(
        len(microbatch.label_ids_L) for work in batch.rounds for microbatch in work.microbatches
    )
    return max(_sum_over_data_ranks(own, topology), 1)


def _count_failures(batch: StepBatch, topology: Topology) -> int:
    """Samples of the step that were dropped; each is counted by the ranks that found it."""
    total = torch.tensor(len(batch.failures), dtype=torch.int64, device=device())
    dist.all_reduce(total)
    return int(total)


def _sum_over_data_ranks(value: int, topology: Topology) -> int:
    total = torch.tensor(value, dtype=torch.int64, device=device())
    dist.all_reduce(total, group=topology.data_group)
    return int(total)


def _sum_by_source(
    reports: list[LabelLosses], num_sources: int, topology: Topology
) -> tuple[list[float], list[float]]:
    """Loss sums and token counts by source over the step, equal on every rank."""
    totals = torch.zeros(2, num_sources, dtype=torch.float64, device=device())
    if topology.is_last_pp_stage and topology.tensor_rank == 0:
        for report in reports:
            sources = torch.tensor(report.sources, dtype=torch.int64, device=device())
            totals[0].index_add_(0, sources, report.losses_L.double())
            totals[1].index_add_(0, sources, torch.ones_like(sources, dtype=torch.float64))
    dist.all_reduce(totals)
    sums, counts = totals.tolist()
    return sums, counts
