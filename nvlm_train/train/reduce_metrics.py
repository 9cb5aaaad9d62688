"""Sums what a step did over the world: losses by source, tokens, tiles. Every rank gets the same sums."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nvlm_train.costs import StepWork
from nvlm_train.device_batch import DeviceStep
from nvlm_train.parallel.topology import Topology, device
from nvlm_train.pipeline.loss import LabelLosses, kept_weights
from nvlm_train.pipeline.step_counts import StepCounts


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


def count_trained_tokens(batch: DeviceStep, topology: Topology) -> Tensor:
    """Counts the trained tokens of the whole step over all data-parallel ranks, on the device.

    Returns:
        fp64, a scalar of at least 1, because the loss is divided by it.
    """
    kept = 1 - batch.failed
    weights = [kept_weights(pack, kept) for round_ in batch.rounds for pack in round_.packs]
    total = torch.cat(weights).sum(dtype=torch.float64)
    dist.all_reduce(total, group=topology.data_group)
    return total.clamp(min=1)


def reduce_step(
    batch: DeviceStep,
    reports: list[LabelLosses],
    grad_norm: float,
    num_sources: int,
    topology: Topology,
) -> StepResult:
    """Adds up everything that is reported about a step, in one all-reduce over the world.

    The host reads the device here, for the second and last time of a step (`gradient_norm` is the first).

    Args:
        batch: this rank's view of the step.
        reports: this rank's losses; empty except on the last pipeline stage.
        grad_norm: this rank's; replicas with broken gradients may disagree about it.
        num_sources: sources of the blend.
        topology: this rank's place.
    """
    loss_sums = torch.zeros(num_sources, dtype=torch.float64, device=device())
    tokens, counts = torch.zeros_like(loss_sums), torch.zeros_like(batch.counts)
    skipped = torch.zeros(1, dtype=torch.float64, device=device())
    # One rank of each replica reports for it: one that holds the losses.
    if topology.is_last_pp_stage and topology.tensor_rank == 0:
        losses_L = torch.cat([report.losses_L for report in reports]).double()
        weights_L = torch.cat([report.weights_L for report in reports]).double()
        sources_L = torch.cat([report.sources_L for report in reports])
        loss_sums.index_add_(0, sources_L, losses_L * weights_L)
        tokens.index_add_(0, sources_L, weights_L)
        counts, skipped = batch.counts, batch.failed.sum(dtype=torch.float64)[None]
    not_finite = torch.full_like(skipped, not math.isfinite(grad_norm))
    parts = [loss_sums, tokens, counts, skipped, not_finite]
    totals = torch.cat(parts)
    dist.all_reduce(totals)
    return _result(totals.tolist(), num_sources, grad_norm)


def _result(totals: list[float], num_sources: int, grad_norm: float) -> StepResult:
    loss_sums = totals[:num_sources]
    tokens = [round(count) for count in totals[num_sources : 2 * num_sources]]
    *counts, skipped, not_finite = totals[2 * num_sources :]
    total = StepCounts(*(round(count) for count in counts))
    return StepResult(
        loss=sum(loss_sums) / max(sum(tokens), 1),
        grad_norm=math.nan if not_finite else grad_norm,
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
        skipped_samples=round(skipped),
        samples_hash=total.samples_hash,
    )
