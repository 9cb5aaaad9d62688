"""A stage's blend in numbers: what its sources hold, and what its first steps draw from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nvlm_train.batch import PackPlan, SampleRef, StepPlan
from nvlm_train.data.plan.plan import DataPlan
from nvlm_train.data.plan.sources import Source

HISTOGRAM_BINS = 16


@dataclass(frozen=True)
class Amount:
    """A number of samples and what they come to."""

    samples: int
    tokens: int
    """Decoder tokens, image tokens included."""
    trained_tokens: int
    tiles: int


@dataclass(frozen=True)
class SourceStatistics:
    """One source: what it holds, and what the steps draw from it."""

    name: str
    held: Amount
    """Usable samples of its shards, each once."""
    num_unusable: int
    num_truncated: int
    lengths: tuple[int, ...]
    """`HISTOGRAM_BINS` counts of usable samples by tokens, from 0 to the sequence length."""
    share_asked: float
    """The share of all samples drawn that its weight asks for."""
    drawn: Amount
    epochs: float
    """How often the stage's steps go through its samples at the pace of the steps looked at."""


@dataclass(frozen=True)
class Balance:
    """Load of the busiest data-parallel rank over the mean load; 1 is even."""

    mean: float
    worst: float
    """The worst of the steps looked at."""


@dataclass(frozen=True)
class BlendStatistics:
    """A stage's blend in numbers, over its first `num_steps` steps."""

    sources: tuple[SourceStatistics, ...]
    num_steps: int
    dp_size: int
    num_packs: int
    """Empty ones included: a rank computes those, too."""
    pack_lengths: tuple[int, ...]
    """What the steps' packs are filled up to, ascending; one length a step. [tokens]"""
    packing_efficiency: float
    """Tokens over the token budget of the packs."""
    balance_tokens: Balance
    balance_tiles: Balance
    balance_attention: Balance
    """What attention computes, cross-attention included."""


def blend_statistics(
    plan: DataPlan, num_steps: int, dp_size: int, stage_steps: int
) -> BlendStatistics:
    """Reads the plan's first `num_steps` steps; `stage_steps` is how many the stage has."""
    steps = [plan.step(step, dp_size) for step in range(num_steps)]
    packs = [pack for step in steps for rank in step.packs for pack in rank]
    drawn: list[list[SampleRef]] = [[] for _ in plan.sources]
    for pack in packs:
        for sample in pack.samples:
            drawn[sample.source].append(sample)
    weights = sum(source.weight for source in plan.sources)
    tokens = sum(pack.num_tokens for pack in packs)
    return BlendStatistics(
        sources=tuple(
            _source_statistics(
                source, samples, source.weight / weights, stage_steps / num_steps, plan
            )
            for source, samples in zip(plan.sources, drawn, strict=True)
        ),
        num_steps=num_steps,
        dp_size=dp_size,
        num_packs=len(packs),
        pack_lengths=tuple(sorted({step.pack_length for step in steps})),
        packing_efficiency=tokens / sum(budget(step) for step in steps),
        balance_tokens=_balance(steps, lambda pack: pack.num_tokens),
        balance_tiles=_balance(steps, lambda pack: pack.num_tiles),
        balance_attention=_balance(steps, plan.packing.attention.of_pack),
    )


def imbalance(loads: Sequence[int]) -> float:
    """Returns the largest load over the mean; 1 where there is no load.

    >>> imbalance([3, 1]), imbalance([0, 0])
    (1.5, 1.0)
    """
    total = sum(loads)
    return max(loads) * len(loads) / total if total else 1.0


def rank_loads(step: StepPlan, load: Callable[[PackPlan], int]) -> list[int]:
    """Returns the sum over the packs of each data-parallel rank."""
    return [sum(load(pack) for pack in packs) for packs in step.packs]


def budget(step: StepPlan) -> int:
    """Counts the tokens of all packs of a step, padding included."""
    return step.pack_length * sum(len(packs) for packs in step.packs)


def _balance(steps: Sequence[StepPlan], load: Callable[[PackPlan], int]) -> Balance:
    found = [imbalance(rank_loads(step, load)) for step in steps]
    return Balance(sum(found) / len(found), max(found))


def _source_statistics(
    source: Source, drawn: Sequence[SampleRef], asked: float, pace: float, plan: DataPlan
) -> SourceStatistics:
    tokens = trained = tiles = 0
    histogram: NDArray[np.int64] = np.zeros(HISTOGRAM_BINS, dtype=np.int64)
    for lengths in source.lengths:
        tokens += int(lengths.num_tokens.sum(dtype=np.int64))
        trained += int(lengths.num_trained.sum(dtype=np.int64))
        tiles += int(lengths.num_tiles.sum(dtype=np.int64))
        usable = lengths.num_tokens[lengths.num_trained > 0]
        counts, _ = np.histogram(usable, HISTOGRAM_BINS, (0, plan.sequence_length))
        histogram += counts
    usable_samples = source.num_samples - source.num_unusable
    return SourceStatistics(
        name=source.name,
        held=Amount(usable_samples, tokens, trained, tiles),
        num_unusable=source.num_unusable,
        num_truncated=source.num_truncated,
        lengths=tuple(histogram.tolist()),
        share_asked=asked,
        drawn=_drawn(source, drawn),
        epochs=len(drawn) * pace / usable_samples,
    )


def _drawn(source: Source, samples: Sequence[SampleRef]) -> Amount:
    trained = 0
    shards = np.array([sample.shard for sample in samples], dtype=np.int64)
    rows = np.array([sample.row for sample in samples], dtype=np.int64)
    for shard in np.unique(shards).tolist():
        trained += int(source.lengths[shard].num_trained[rows[shards == shard]].sum())
    return Amount(
        len(samples),
        sum(sample.num_tokens for sample in samples),
        trained,
        sum(sample.num_tiles for sample in samples),
    )
