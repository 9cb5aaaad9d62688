"""Sums what a step did over the world: losses by source, tokens, tiles. Every rank gets the same sums."""

from __future__ import annotations

import math
import zlib
from dataclasses import astuple, dataclass
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from nvlm_train.batch import Microbatch, StepBatch
from nvlm_train.costs import StepWork
from nvlm_train.parallel.topology import Topology, device
from nvlm_train.pipeline.loss import LabelLosses


@dataclass(frozen=True)
class StepResult:
    """Holds what one step reports. It is the same on every rank."""

    loss: float
    """Mean over the step's trained tokens."""
    grad_norm: float
    """Norm before clipping; NaN when it is not finite on some rank."""
    source_loss_sums: tuple[float, ...]
    """Sum of the losses of trained tokens by source."""
    source_tokens: tuple[int, ...]
    """Trained tokens by source."""
    work: StepWork
    samples: int
    skipped_samples: int
    """Samples that are not trained on, because an image of theirs could not be decoded."""
    samples_hash: int
    """Sum of the CRC-32 of the step's sample names. It does not depend on their order or on the layout."""

    @property
    def is_finite(self) -> bool:
        """Says whether the step may change weights."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


@dataclass
class StepCounts:
    """Counts of one step that add up over replicas. Each sum is exact in fp64."""

    tokens: int = 0
    """Decoder tokens without padding."""
    attention_pairs: int = 0
    """Sum over samples of length squared."""
    tiles: int = 0
    samples: int = 0
    cross_tokens: int = 0
    """Decoder tokens of packs that have a cross-attention context."""
    context_tokens: int = 0
    """Tokens of those contexts."""
    cross_pairs: int = 0
    """Pairs of a decoder token and a context token that it sees."""
    skipped_samples: int = 0
    samples_hash: int = 0
    ranks_not_finite: int = 0
    """Ranks whose gradient norm is not finite."""

    def to_tensor(self) -> Tensor:
        """Returns the fields in their order: fp64 [number of fields]."""
        return torch.tensor(astuple(self), dtype=torch.float64, device=device())

    @classmethod
    def from_tensor(cls, values: Tensor) -> Self:
        """Reads what `to_tensor` wrote, or a sum of such tensors."""
        return cls(*(int(value) for value in values.tolist()))


def count_trained_tokens(batch: StepBatch, topology: Topology) -> int:
    """Counts the trained tokens of the whole step over all data-parallel ranks.

    Returns:
        At least 1, because the loss is divided by it.
    """
    own = sum(len(microbatch.label_ids_L) for microbatch in _microbatches(batch))
    total = torch.tensor(own, dtype=torch.int64, device=device())
    dist.all_reduce(total, group=topology.data_group)
    return max(int(total), 1)


def reduce_step(
    batch: StepBatch,
    reports: list[LabelLosses],
    grad_norm: float,
    skipped: int,
    num_sources: int,
    topology: Topology,
) -> StepResult:
    """Adds up everything that is reported about a step, in one all-reduce over the world.

    Args:
        batch: this rank's view of the step.
        reports: this rank's losses; empty except on the last pipeline stage.
        grad_norm: this rank's; replicas with broken gradients may disagree about it.
        skipped: samples of this replica whose image could not be decoded.
        num_sources: sources of the blend.
        topology: this rank's place.
    """
    loss_sums = torch.zeros(num_sources, dtype=torch.float64, device=device())
    tokens = torch.zeros_like(loss_sums)
    counts = StepCounts()
    # One rank of each replica reports for it: one that holds the losses.
    if topology.is_last_pp_stage and topology.tensor_rank == 0:
        for report in reports:
            sources = torch.tensor(report.sources, dtype=torch.int64, device=device())
            losses_L = report.losses_L.double()
            loss_sums.index_add_(0, sources, losses_L)
            tokens.index_add_(0, sources, torch.ones_like(losses_L))
        counts = _count_replica(batch, skipped)
    counts.ranks_not_finite = int(not math.isfinite(grad_norm))
    parts = [loss_sums, tokens, counts.to_tensor()]
    totals = torch.cat(parts)
    dist.all_reduce(totals)
    loss_sums, tokens, totals = totals.split([len(part) for part in parts])
    return _result(
        loss_sums.tolist(),
        [int(count) for count in tokens.tolist()],
        StepCounts.from_tensor(totals),
        grad_norm,
    )


def _result(
    loss_sums: list[float], tokens: list[int], total: StepCounts, grad_norm: float
) -> StepResult:
    return StepResult(
        loss=sum(loss_sums) / max(sum(tokens), 1),
        grad_norm=math.nan if total.ranks_not_finite else grad_norm,
        source_loss_sums=tuple(loss_sums),
        source_tokens=tuple(tokens),
        work=StepWork(
            tokens=total.tokens,
            attention_pairs=total.attention_pairs,
            trained_tokens=sum(tokens),
            tiles=total.tiles,
            cross_tokens=total.cross_tokens,
            context_tokens=total.context_tokens,
            cross_pairs=total.cross_pairs,
        ),
        samples=total.samples,
        skipped_samples=total.skipped_samples,
        samples_hash=total.samples_hash,
    )


def _count_replica(batch: StepBatch, skipped: int) -> StepCounts:
    """Counts what this replica processes in a step."""
    counts = StepCounts(skipped_samples=skipped, samples_hash=_hash_samples(batch))
    for microbatch in _microbatches(batch):
        # Padding, if there is any, is one more segment than there are samples.
        lengths = microbatch.cu_seqlens.diff()[: len(microbatch.samples)].long()
        counts.tokens += int(lengths.sum())
        counts.attention_pairs += int(lengths.square().sum())
        counts.tiles += microbatch.num_tiles
        counts.samples += len(microbatch.samples)
        if microbatch.context is not None:
            counts.cross_tokens += len(microbatch.token_ids_S)
            counts.context_tokens += microbatch.context.length
            start, stop, first, last = microbatch.context.spans.long().unbind(dim=1)
            counts.cross_pairs += int(((stop - start) * (last - first)).sum())
    return counts


def _hash_samples(batch: StepBatch) -> int:
    """Adds up 32-bit hashes; their sum stays exact in fp64 for two million samples a step."""
    return sum(
        zlib.crc32(f"{sample.shard}/{sample.key}".encode())
        for microbatch in _microbatches(batch)
        for sample in microbatch.samples
    )


def _microbatches(batch: StepBatch) -> list[Microbatch]:
    return [microbatch for round_ in batch.rounds for microbatch in round_.microbatches]
