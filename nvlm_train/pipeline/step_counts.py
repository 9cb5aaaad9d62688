"""Counts what a replica processes in a step, from the plan's numbers."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from nvlm_train.batch import Microbatch, StepBatch


class StepCounts(NamedTuple):
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
    samples_hash: int = 0
    """Sum of the CRC-32 of the samples' names."""


def count_replica(batch: StepBatch) -> StepCounts:
    """Counts one replica's part of a step."""
    counts = [_count(microbatch) for microbatch in _microbatches(batch)]
    return StepCounts(*(sum(column) for column in zip(*counts, strict=True)))


def _count(microbatch: Microbatch) -> StepCounts:
    # Padding, if there is any, is one more segment than there are samples.
    lengths = np.diff(microbatch.cu_seqlens.numpy())[: len(microbatch.samples)].astype(np.int64)
    context = microbatch.context
    pairs = 0
    if context is not None:
        start, stop, first, last = context.spans.numpy().astype(np.int64).T
        pairs = int(((stop - start) * (last - first)).sum())
    return StepCounts(
        tokens=int(lengths.sum()),
        attention_pairs=int(np.square(lengths).sum()),
        tiles=microbatch.num_tiles,
        samples=len(microbatch.samples),
        cross_tokens=0 if context is None else len(microbatch.token_ids_S),
        context_tokens=0 if context is None else context.length,
        cross_pairs=pairs,
        samples_hash=_hash_samples(microbatch),
    )


def _hash_samples(microbatch: Microbatch) -> int:
    """Adds up 32-bit hashes; their sum stays exact in fp64 for two million samples a step."""
    return sum(zlib.crc32(f"{sample.shard}/{sample.key}".encode()) for sample in microbatch.samples)


def _microbatches(batch: StepBatch) -> Iterator[Microbatch]:
    for round_ in batch.rounds:
        yield from round_.microbatches
