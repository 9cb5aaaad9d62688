"""The plan: which samples make step n, packed how, on which data-parallel rank.

A pure function of (blend, index, encoding, seed, step): every rank computes the same without
talking, and no state but the step number has to be saved.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from nvlm_train.batch import PackPlan, SampleInfo, SampleRef, StepPlan
from nvlm_train.config.schema import BatchConfig
from nvlm_train.data.blend import BlendOrder, SourceOrder
from nvlm_train.data.lengths import ShardLengths
from nvlm_train.data.ordering import hashed_permutation, stable_hash
from nvlm_train.data.packing import best_fit_decreasing, deal
from nvlm_train.data.reader import ShardReader
from nvlm_train.errors import ShardError, TrainingError

_EXAMPLES = 3


@dataclass(frozen=True)
class Source:
    """A source of the blend with all its shards open."""

    name: str
    weight: float
    readers: tuple[ShardReader, ...]
    lengths: tuple[ShardLengths, ...]

    @property
    def num_samples(self) -> int:
        return sum(len(reader.index) for reader in self.readers)

    @property
    def num_unusable(self) -> int:
        return sum(len(lengths.reasons) for lengths in self.lengths)

    @property
    def num_truncated(self) -> int:
        return sum(int(lengths.is_truncated.sum()) for lengths in self.lengths)


@dataclass(frozen=True)
class UnusableKind:
    """Samples of a blend that cannot be used for one kind of reason."""

    kind: str
    count: int
    examples: tuple[str, ...]
    """`sample=... in shard=...: reason`, a few."""


class DataPlan:
    """Steps of one stage.

    Raises:
        TrainingError: no usable sample in a source, or more unusable ones than `max_skipped_fraction`.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        batch: BatchConfig,
        sequence_length: int,
        seed: int,
        max_skipped_fraction: float,
    ) -> None:
        self.sources = tuple(sources)
        self.batch = batch
        self.sequence_length = sequence_length
        self.seed = seed
        self.unusable = _unusable_kinds(self.sources)
        self._check_skipped(max_skipped_fraction)
        self._blend = BlendOrder([source.weight for source in self.sources], seed)
        self._orders = [
            SourceOrder(
                [np.flatnonzero(lengths.num_trained > 0) for lengths in source.lengths],
                seed,
                source.name,
            )
            for source in self.sources
        ]
        self._packs_before = [0]
        self._window = lru_cache(maxsize=16)(self._make_window)

    @property
    def source_names(self) -> tuple[str, ...]:
        return tuple(source.name for source in self.sources)

    @property
    def digests(self) -> dict[str, str]:
        """Shard (as the data recipe names it) -> digest of its contents. Stored in checkpoints."""
        return {
            reader.name: reader.index.digest for source in self.sources for reader in source.readers
        }

    @property
    def fingerprint(self) -> str:
        """Equal fingerprints make equal steps: hash of blend, contents, lengths, seed and batch."""
        parts: list[object] = [self.seed, self.batch.size, self.batch.unit, self.batch.window]
        parts.append(self.sequence_length)
        digest = hashlib.sha256()
        for source in self.sources:
            parts.append(
                [source.name, source.weight, [reader.index.digest for reader in source.readers]]
            )
            for lengths in source.lengths:
                digest.update(
                    np.stack([lengths.num_tokens, lengths.num_tiles, lengths.num_trained]).tobytes()
                )
        digest.update(json.dumps(parts).encode())
        return digest.hexdigest()

    def check_digests(self, recorded: Mapping[str, str]) -> None:
        """Compares with the digests of the run that is continued.

        Raises:
            ShardError: a shard with other contents, a missing one, or a new one: all would change
                which samples the remaining steps draw.
        """
        now = self.digests
        for name, digest in recorded.items():
            if name not in now:
                raise ShardError(
                    f"shard={name} was in the blend when the run began and is not any more; "
                    "put it back, or start a new run"
                )
            if now[name] != digest:
                raise ShardError(
                    f"changed shard={name}: digest={now[name][:12]}, the run began with {digest[:12]}; "
                    "restore the shard, or start a new run"
                )
        for name in now:
            if name not in recorded:
                raise ShardError(
                    f"shard={name} was not in the blend when the run began; take it out, or start a new run"
                )

    def reader(self, sample: SampleRef) -> ShardReader:
        """Where the sample is read."""
        return self.sources[sample.source].readers[sample.shard]

    def info(self, sample: SampleRef) -> SampleInfo:
        """Provenance of the sample."""
        reader = self.reader(sample)
        return SampleInfo(sample.source, reader.name, reader.key(sample.row))

    def step(self, step: int, dp_size: int) -> StepPlan:
        """Everything of optimizer step `step` (from 0); its samples do not depend on `dp_size`."""
        size = self.batch.size
        if self.batch.unit == "samples":
            packs = self._pack(self.draws(step * size, (step + 1) * size))
        else:
            packs = self._packs(step * size, (step + 1) * size)
        return StepPlan(step, deal(packs, dp_size))

    def draws(self, start: int, stop: int) -> list[SampleRef]:
        """Samples [start, stop) of the stage in the order in which they are drawn."""
        sources, numbers = self._blend.draws(start, stop)
        refs: list[SampleRef | None] = [None] * (stop - start)
        for number, source in enumerate(self.sources):
            places = np.flatnonzero(sources == number)
            if len(places) == 0:
                continue
            # A source's draws inside a range of the blend follow each other.
            first = int(numbers[places[0]])
            located = self._orders[number].locate(first, first + len(places))
            for place, shard, row in zip(
                places.tolist(), *(part.tolist() for part in located), strict=True
            ):
                lengths = source.lengths[shard]
                refs[place] = SampleRef(
                    number, shard, row, int(lengths.num_tokens[row]), int(lengths.num_tiles[row])
                )
        return [ref for ref in refs if ref is not None]

    def _pack(self, samples: Sequence[SampleRef]) -> list[PackPlan]:
        groups = best_fit_decreasing(
            [sample.num_tokens for sample in samples], self.sequence_length
        )
        return [PackPlan(tuple(samples[index] for index in group)) for group in groups]

    def _packs(self, start: int, stop: int) -> list[PackPlan]:
        """Packs [start, stop) of the stage when packs are the unit."""
        while self._packs_before[-1] < stop:
            window = len(self._packs_before) - 1
            self._packs_before.append(self._packs_before[-1] + len(self._window(window)))
        found: list[PackPlan] = []
        window = bisect_right(self._packs_before, start) - 1
        while len(found) < stop - start:
            skip = max(0, start - self._packs_before[window])
            found += self._window(window)[skip : skip + stop - start - len(found)]
            window += 1
        return found

    def _make_window(self, window: int) -> list[PackPlan]:
        """Packs of one window of draws, shuffled: packing makes them from long to short samples."""
        size = self.batch.window
        packs = self._pack(self.draws(window * size, (window + 1) * size))
        order = hashed_permutation(len(packs), stable_hash("packs", self.seed, window))
        return [packs[index] for index in order.tolist()]

    def _check_skipped(self, max_skipped_fraction: float) -> None:
        examples = "\n".join(f"  {text}" for kind in self.unusable for text in kind.examples)
        for source in self.sources:
            if source.num_unusable == source.num_samples:
                raise TrainingError(
                    f"source={source.name} has no usable sample, for example\n{examples}"
                )
        total = sum(source.weight for source in self.sources)
        share = sum(s.weight / total * s.num_unusable / s.num_samples for s in self.sources)
        if share > max_skipped_fraction:
            raise TrainingError(
                f"{share:.2%} of the samples drawn cannot be used, more than "
                f"loader.max_skipped_fraction={max_skipped_fraction}; mend them or raise the limit:\n{examples}"
            )


def _unusable_kinds(sources: Sequence[Source]) -> tuple[UnusableKind, ...]:
    """Reasons grouped by the text before their first colon, most frequent first."""
    counts: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    for source in sources:
        for reader, lengths in zip(source.readers, source.lengths, strict=True):
            for row, reason in lengths.reasons.items():
                kind = reason.partition(":")[0]
                counts[kind] += 1
                shown = examples.setdefault(kind, [])
                if len(shown) < _EXAMPLES:
                    shown.append(f"sample={reader.key(row)} in shard={reader.name}: {reason}")
    return tuple(
        UnusableKind(kind, count, tuple(examples[kind])) for kind, count in counts.most_common()
    )
