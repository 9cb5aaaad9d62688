"""The plan: which samples make step n, packed how, on which data-parallel rank.

It is a pure function of (blend, index, encoding, seed, step): every rank computes the same without
talking, and no state but the step number has to be saved.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from nvlm_train.batch import PackPlan, SampleInfo, SampleRef, StepPlan
from nvlm_train.config.schema import BatchConfig
from nvlm_train.data.index.reader import ShardReader
from nvlm_train.data.ordering import hashed_permutation, stable_hash
from nvlm_train.data.plan.blend import Blender, Draws
from nvlm_train.data.plan.pack_table import PackTable
from nvlm_train.data.plan.packing import Packing, SampleSizes, best_fit_decreasing, deal, spread
from nvlm_train.data.plan.sources import Source, check_skipped, check_tiles, unusable_kinds
from nvlm_train.errors import ShardError, TrainingError
from nvlm_train.geometry import length_for

_TABLE_CHARS = 16


class DataPlan:
    """The steps of one stage.

    Args:
        sequence_length: a sample has at most this many tokens.
        table_stem: path before `.packs-FINGERPRINT`, the file that finds a step when packs are the
            unit; None to count in memory.
        packing: of packs that are longer than a sample, and of a known model; None for
            `sequence_length`.

    Raises:
        TrainingError: a source without usable samples, more unusable ones than
            `max_skipped_fraction` of what would be drawn, or a sample of more tiles than a pack.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        batch: BatchConfig,
        sequence_length: int,
        seed: int,
        max_skipped_fraction: float,
        table_stem: Path | None = None,
        packing: Packing | None = None,
    ) -> None:
        self.sources = tuple(sources)
        self.batch = batch
        self.sequence_length = sequence_length
        self.packing = packing or Packing((sequence_length,))
        self.seed = seed
        self.unusable = unusable_kinds(self.sources)
        check_skipped(self.sources, self.unusable, max_skipped_fraction)
        check_tiles(self.sources, batch.max_tiles_per_pack)
        self._blender = Blender(self.sources, seed)
        self._table_stem = table_stem
        self._groups_of = lru_cache(maxsize=4)(self._make_groups)
        self._window = lru_cache(maxsize=4)(self._make_window)

    @property
    def source_names(self) -> tuple[str, ...]:
        """The sources' names, in the order of the blend."""
        return tuple(source.name for source in self.sources)

    @property
    def digests(self) -> dict[str, str]:
        """The digest of every shard (as the data recipe names it), and the plan's own.

        They are stored in checkpoints, and `check_digests` compares them.
        """
        contents = {
            name: source.table.digest(shard)
            for source in self.sources
            for shard, name in enumerate(source.table.names)
        }
        return contents | {PLAN_DIGEST: self.fingerprint}

    @property
    def _packs_are_longer(self) -> bool:
        return self.packing.most_tokens != self.sequence_length

    @cached_property
    def fingerprint(self) -> str:
        """Equal fingerprints make equal steps: hash of blend, contents, encoding, seed and batch."""
        encodings = [source.table.encoding for source in self.sources]
        return self._hash_with(encodings)

    @property
    def first_fingerprint(self) -> str:
        """The fingerprint that checkpoints of format 1 have: they know an encoding by its lengths only."""
        return self._hash_with([])

    def _hash_with(self, encodings: list[str]) -> str:
        digest = hashlib.sha256()
        parts: list[object] = [self.seed, asdict(self.batch), self.sequence_length]
        if self._packs_are_longer:
            parts.append(["pack_length", self.packing.most_tokens])
        for source in self.sources:
            parts.append([source.name, source.weight, source.max_draws])
            parts.append([len(source.table.names), source.table.lengths_digest])
            digest.update(source.table.digests.tobytes())
        digest.update(json.dumps([*parts, *encodings], sort_keys=True).encode())
        return digest.hexdigest()

    def check_digests(self, recorded: Mapping[str, str]) -> None:
        """Compares with the digests of the run that is continued.

        Raises:
            ShardError: other contents, a shard more or less, or another order of the samples.
        """
        check_digests(recorded, self.digests, self.first_fingerprint)

    def reader(self, sample: SampleRef) -> ShardReader:
        """Returns the reader of the sample's shard."""
        return self.sources[sample.source].readers[sample.shard]

    def info(self, sample: SampleRef) -> SampleInfo:
        """Returns where the sample comes from."""
        reader = self.reader(sample)
        return SampleInfo(sample.source, reader.name, reader.key(sample.row))

    def step(self, step: int, dp_size: int) -> StepPlan:
        """Returns the plan of optimizer step `step` (from 0); its samples do not depend on `dp_size`.

        Where packs are longer than samples and samples are the unit, they are spread over as many packs as
        give every data-parallel rank equally many, all about equally full.

        Raises:
            TrainingError: the sources have left the blend before the step is full.
        """
        size = self.batch.size
        if self.batch.unit == "samples":
            draws = self._blender.draw(step * size, (step + 1) * size)
            packs = self._step_packs(draws, dp_size) if len(draws) == size else []
        else:
            packs = self._packs(step * size, (step + 1) * size)
        if not packs:
            raise self._too_short(f"step={step}")
        longest = max(pack.num_tokens for pack in packs)
        length = length_for(longest, self.packing.lengths)
        return StepPlan(step, deal(packs, dp_size, self.packing.attention), length)

    def draws(self, start: int, stop: int) -> list[SampleRef]:
        """Returns samples [start, stop) of the stage in the order in which they are drawn.

        There are fewer where the sources have limits and all of them have left the blend.
        """
        return self._blender.draw(start, stop).refs()

    def check_steps(self, steps: int) -> None:
        """Refuses a stage of more steps than the sources' limits allow.

        Where packs are the unit, those of a limited blend are counted, once.

        Raises:
            TrainingError: too few samples, or too few packs.
        """
        total, wanted = self._blender.num_draws, steps * self.batch.size
        if total is None:
            return
        if self.batch.unit == "samples":
            is_enough = wanted <= total
        else:
            # A pack holds a sample or more, which decides the plain cases without counting.
            is_enough = wanted <= total and (
                self.packs_before.find(wanted - 1, self.num_windows) is not None
            )
        if not is_enough:
            raise self._too_short(f"steps={steps}")

    @cached_property
    def packs_before(self) -> PackTable:
        """The table of where the packs of each window begin, when packs are the unit."""
        stem = self._table_stem
        name = f"{stem and stem.name}.packs-{self.fingerprint[:_TABLE_CHARS]}"
        path = None if stem is None else stem.with_name(name)
        return PackTable(self.count_packs, path, self.fingerprint)

    @property
    def num_windows(self) -> int | None:
        """Windows of `batch.window` draws until all sources have left; None without an end."""
        total = self._blender.num_draws
        return None if total is None else math.ceil(total / self.batch.window)

    def count_packs(self, window: int) -> int:
        """Counts the packs that the window's draws make."""
        return len(self._groups_of(window)[1])

    def _groups(self, draws: Draws) -> list[list[int]]:
        """Returns the draws that share a pack, by their numbers in `draws`."""
        return best_fit_decreasing(
            draws.num_tokens.tolist(),
            self.packing.most_tokens,
            draws.num_tiles.tolist(),
            self.batch.max_tiles_per_pack,
        )

    def _step_packs(self, draws: Draws, dp_size: int) -> list[PackPlan]:
        """Returns the packs of a step when samples are the unit."""
        groups = self._groups(draws)
        if self._packs_are_longer:
            tokens, tiles = draws.num_tokens, draws.num_tiles
            costs = [
                self.packing.attention.of_sample(*each)
                for each in zip(tokens.tolist(), tiles.tolist(), strict=True)
            ]
            groups = spread(
                groups,
                math.ceil(len(groups) / dp_size) * dp_size,
                SampleSizes(tokens, tiles, np.array(costs, dtype=np.int64)),
                self.packing.lengths,
                self.batch.max_tiles_per_pack,
            )
        return _to_packs(draws, groups)

    def _packs(self, start: int, stop: int) -> list[PackPlan]:
        """Returns packs [start, stop) of the stage when packs are the unit; none when they are too few."""
        table = self.packs_before
        if table.find(stop - 1, self.num_windows) is None:
            return []
        found: list[PackPlan] = []
        while len(found) < stop - start:
            window = table.find(start + len(found), self.num_windows)
            assert window is not None
            skip = start + len(found) - table.before(window)
            found += self._window(window)[skip : skip + stop - start - len(found)]
        return found

    def _make_groups(self, window: int) -> tuple[Draws, list[list[int]]]:
        """Returns the draws of a window, and which of them share a pack."""
        size = self.batch.window
        draws = self._blender.draw(window * size, (window + 1) * size)
        return draws, self._groups(draws)

    def _make_window(self, window: int) -> list[PackPlan]:
        """Returns the packs of one window, shuffled: packing makes them from long to short samples."""
        packs = _to_packs(*self._groups_of(window))
        order = hashed_permutation(len(packs), stable_hash("packs", self.seed, window))
        return [packs[index] for index in order.tolist()]

    def _too_short(self, wanted: str) -> TrainingError:
        limits = ", ".join(
            f"{source.name} {source.max_draws:,}"
            for source in self.sources
            if source.max_draws is not None
        )
        return TrainingError(
            f"{wanted} is more than the blend gives with batch.size={self.batch.size} "
            f"{self.batch.unit}: its sources leave after {self._blender.num_draws:,} samples "
            f"({limits}; epochs and max_samples of the data recipe); make fewer steps, or raise "
            "the limits"
        )


def _to_packs(draws: Draws, groups: Sequence[Sequence[int]]) -> list[PackPlan]:
    samples = draws.refs()
    return [PackPlan(tuple(samples[i] for i in group)) for group in groups]


PLAN_DIGEST = "(plan)"
"""Name of the plan's own entry among the shards' digests."""


def check_digests(recorded: Mapping[str, str], now: Mapping[str, str], first_plan: str) -> None:
    """Compares the digests of the run that is continued with those of today's data.

    Args:
        recorded: of the checkpoint.
        now: today's.
        first_plan: the plan's digest as checkpoints of format 1 have it.

    Raises:
        ShardError: other contents, a shard more or less, or another order of the samples.
    """
    remedy = "or start a new run"
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
    if recorded[PLAN_DIGEST] not in (now[PLAN_DIGEST], first_plan):
        raise ShardError(
            "the shards are those the run began with, but seed, batch, weights, order of the "
            "sources or encoding (tokenizer, tiling, prompts, nvlm-train's own version) are not; "
            f"restore them, {remedy}"
        )
