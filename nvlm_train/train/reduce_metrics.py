"""What a step did, summed over the world: losses by source, tokens, tiles. Equal on every rank."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import torch
import torch.distributed as dist

from nvlm_train.batch import Microbatch, StepBatch
from nvlm_train.costs import StepWork
from nvlm_train.parallel.topology import Topology, device
from nvlm_train.pipeline.loss import LabelLosses


@dataclass(frozen=True)
class StepResult:
    """What a step reports."""

    loss: float
    """Mean over the step's trained tokens."""
    grad_norm: float
    """Before clipping; not a number where it is not finite on some rank."""
    source_loss_sums: tuple[float, ...]
    source_tokens: tuple[int, ...]
    """Trained tokens by source."""
    work: StepWork
    samples: int
    skipped_samples: int
    """Samples whose image could not be decoded."""
    samples_hash: int
    """Sum of the CRC-32 of the step's sample names: equal for equal samples, in whatever order and layout."""

    @property
    def is_finite(self) -> bool:
        """Whether the step may change weights. Every rank has the same answer."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def count_trained_tokens(batch: StepBatch, topology: Topology) -> int:
    """Trained tokens of the whole step, over all data-parallel ranks; at least 1, as it divides."""
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
    """One all-reduce over the world for everything that is reported about a step.

    Args:
        batch: this rank's view of the step.
        reports: this rank's losses; empty but on the last pipeline stage.
        grad_norm: this rank's; replicas with broken gradients may disagree about it.
        skipped: samples of this replica whose image could not be decoded.
        num_sources: sources of the blend.
        topology: this rank's place.
    """
    by_source = torch.zeros(2, num_sources, dtype=torch.float64, device=device())
    counts = torch.zeros(10, dtype=torch.float64, device=device())
    # One rank of each replica speaks for it: one that holds the losses.
    if topology.is_last_pp_stage and topology.tensor_rank == 0:
        for report in reports:
            sources = torch.tensor(report.sources, dtype=torch.int64, device=device())
            by_source[0].index_add_(0, sources, report.losses_L.double())
            by_source[1].index_add_(0, sources, torch.ones_like(report.losses_L.double()))
        own = [*_own_work(batch), skipped, _hash_samples(batch), 0]
        counts += torch.tensor(own, dtype=torch.float64, device=device())
    counts[-1] = not math.isfinite(grad_norm)
    totals = torch.cat([by_source.flatten(), counts])
    dist.all_reduce(totals)
    sums = totals[:num_sources].tolist()
    tokens = [int(count) for count in totals[num_sources : 2 * num_sources].tolist()]
    processed, pairs, tiles, samples, *cross, failed, hashed, broken = map(
        int, totals[-10:].tolist()
    )
    return StepResult(
        loss=sum(sums) / max(sum(tokens), 1),
        grad_norm=math.nan if broken else grad_norm,
        source_loss_sums=tuple(sums),
        source_tokens=tuple(tokens),
        work=StepWork(processed, pairs, sum(tokens), tiles, *cross),
        samples=samples,
        skipped_samples=failed,
        samples_hash=hashed,
    )


def _own_work(batch: StepBatch) -> list[int]:
    """This replica's tokens without padding, squared lengths, tiles and samples; then what crosses:
    tokens of packs with a context, tokens of contexts, pairs that see each other.
    """
    tokens = pairs = tiles = samples = cross_tokens = context_tokens = cross_pairs = 0
    for microbatch in _microbatches(batch):
        # The padding, where there is any, is one segment more than there are samples.
        lengths = microbatch.cu_seqlens.diff()[: len(microbatch.samples)].long()
        tokens += int(lengths.sum())
        pairs += int(lengths.square().sum())
        tiles += microbatch.num_tiles
        samples += len(microbatch.samples)
        if microbatch.context is not None:
            cross_tokens += len(microbatch.token_ids_S)
            context_tokens += microbatch.context.length
            start, stop, first, last = microbatch.context.spans.long().unbind(dim=1)
            cross_pairs += int(((stop - start) * (last - first)).sum())
    return [tokens, pairs, tiles, samples, cross_tokens, context_tokens, cross_pairs]


def _hash_samples(batch: StepBatch) -> int:
    """Sums of 32-bit values stay exact in fp64 for two million samples a step."""
    return sum(
        zlib.crc32(f"{sample.shard}/{sample.key}".encode())
        for microbatch in _microbatches(batch)
        for sample in microbatch.samples
    )


def _microbatches(batch: StepBatch) -> list[Microbatch]:
    return [microbatch for round_ in batch.rounds for microbatch in round_.microbatches]
