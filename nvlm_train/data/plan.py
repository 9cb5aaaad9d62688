"""The plan: which samples make step n, packed how, on which data-parallel rank.

A pure function of (blend, index, encoding, seed, step): every rank computes the same without
talking, and no state but the step number has to be saved.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from nvlm_train.batch import PackPlan, SampleInfo, SampleRef, StepPlan
from nvlm_train.config.schema import BatchConfig
from nvlm_train.data.blend import BlendOrder, SourceOrder
from nvlm_train.data.ordering import hashed_permutation, stable_hash
from nvlm_train.data.packing import best_fit_decreasing, deal
from nvlm_train.data.reader import ShardReader
from nvlm_train.data.sources import Source, unusable_kinds
from nvlm_train.errors import ShardError, TrainingError

PLAN_DIGEST = "(plan)"
"""Name of the plan's own entry among the shards' digests."""


class DataPlan:
    """Steps of one stage.

    Raises:
        TrainingError: a source without usable samples, or more unusable ones than
            `max_skipped_fraction` of what would be drawn.
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
        self.unusable = unusable_kinds(self.sources)
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
        # (num_tokens, num_tiles) of every row of a source, shard after shard.
        self._sizes = [
            np.concatenate(
                [np.stack([one.num_tokens, one.num_tiles], axis=1) for one in source.lengths]
            ).astype(np.int64)
            for source in self.sources
        ]
        self._first_rows = [
            np.cumsum([0, *(len(reader.index) for reader in source.readers)])
            for source in self.sources
        ]
        self._packs_before = [0]
        self._window = lru_cache(maxsize=16)(self._make_window)

    @property
    def source_names(self) -> tuple[str, ...]:
        return tuple(source.name for source in self.sources)

    @property
    def digests(self) -> dict[str, str]:
        """Shard (as the data recipe names it) -> digest of its contents, and the plan's own.

        Stored in checkpoints; `check_digests` compares.
        """
        shards = [reader for source in self.sources for reader in source.readers]
        contents = {reader.name: reader.index.digest for reader in shards}
        return contents | {PLAN_DIGEST: self.fingerprint}

    @cached_property
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
            ShardError: other contents, a shard more or less, or another order of the samples.
        """
        remedy = "or start a new run"
        now = self.digests
        for name, digest in recorded.items():
            if name not in now:
                raise ShardError(
                    f"shard={name} was in the blend when the run began and is not any more; "
                    f"put it back, {remedy}"
                )
            if name != PLAN_DIGEST and now[name] != digest:
                raise ShardError(
                    f"changed shard={name}: digest={now[name][:12]}, the run began with "
                    f"{digest[:12]}; restore the shard, {remedy}"
                )
        for name in now:
            if name not in recorded:
                raise ShardError(
                    f"shard={name} was not in the blend when the run began; take it out, {remedy}"
                )
        if now[PLAN_DIGEST] != recorded[PLAN_DIGEST]:
            raise ShardError(
                "the shards are those the run began with, but seed, batch, weights, order of the "
                f"sources or encoding (tokenizer, tiling, prompts) are not; restore them, {remedy}"
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
            packs = self._pack(self._draw(step * size, (step + 1) * size))
        else:
            packs = self._packs(step * size, (step + 1) * size)
        return StepPlan(step, deal(packs, dp_size))

    def draws(self, start: int, stop: int) -> list[SampleRef]:
        """Samples [start, stop) of the stage in the order in which they are drawn."""
        return self._refs(self._draw(start, stop))

    def _draw(self, start: int, stop: int) -> NDArray[np.int64]:
        """The fields of `SampleRef` as columns: int64 [stop - start, 5]."""
        sources, numbers = self._blend.draws(start, stop)
        table = np.empty((stop - start, 5), dtype=np.int64)
        for number, sizes in enumerate(self._sizes):
            places = np.flatnonzero(sources == number)
            if len(places) == 0:
                continue
            # A source's draws inside a range of the blend follow each other.
            first = int(numbers[places[0]])
            shards, rows = self._orders[number].locate(first, first + len(places))
            table[places, 0] = number
            table[places, 1] = shards
            table[places, 2] = rows
            table[places, 3:] = sizes[self._first_rows[number][shards] + rows]
        return table

    def _refs(self, table: NDArray[np.int64]) -> list[SampleRef]:
        return [SampleRef(*fields) for fields in table.tolist()]

    def _groups(self, table: NDArray[np.int64]) -> list[list[int]]:
        return best_fit_decreasing(table[:, 3].tolist(), self.sequence_length)

    def _pack(self, table: NDArray[np.int64]) -> list[PackPlan]:
        samples = self._refs(table)
        return [PackPlan(tuple(samples[i] for i in group)) for group in self._groups(table)]

    def _packs(self, start: int, stop: int) -> list[PackPlan]:
        """Packs [start, stop) of the stage when packs are the unit."""
        while self._packs_before[-1] < stop:
            window = len(self._packs_before) - 1
            size = self.batch.window
            num_packs = len(self._groups(self._draw(window * size, (window + 1) * size)))
            self._packs_before.append(self._packs_before[-1] + num_packs)
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
        packs = self._pack(self._draw(window * size, (window + 1) * size))
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
                f"loader.max_skipped_fraction={max_skipped_fraction}; mend them or raise the "
                f"limit:\n{examples}"
            )
