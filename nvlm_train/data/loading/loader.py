"""One rank's batches: text of all its replica's samples, pixels of its own share of the tiles.

Which rank decodes what follows from the plan's numbers alone. Work is done by pack in background
threads (decoding releases the interpreter lock); results do not depend on how many there are. Each
thread uses torch's intra-op threads as the process set them: with several workers a launcher
should set OMP_NUM_THREADS, as torchrun does.

Memory is bounded: tiles of steps made ahead by `loader.prefetch_gib` (one step more than that only
when a single step takes it all), and each worker holds one decoded image, at most
3 * `loader.max_image_pixels` bytes, with its file and its resized canvas.

Shape legend: T tiles, E tile edge in pixels, C = 3.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from nvlm_train.batch import PackPlan, RankShare, Round, SampleFailure, StepBatch
from nvlm_train.config.schema import LoaderConfig
from nvlm_train.data.loading.pack_loader import LoadedPack, PackJob, PackLoader
from nvlm_train.data.plan.plan import DataPlan
from nvlm_train.data.samples.encoder import SampleEncoder

if TYPE_CHECKING:
    from types import TracebackType

    from torch import Tensor


_PackedRound = tuple[PackPlan, ...]


class _PlannedStep(NamedTuple):
    """A step that waits until there is room for its pixels."""

    step: int
    rounds: list[_PackedRound]
    pack_length: int


@dataclass(frozen=True)
class _PendingRound:
    """A round that the threads are making."""

    tile_split: tuple[int, ...]
    pixels_TCEE: Tensor
    packs: tuple[Future[LoadedPack], ...]


@dataclass(frozen=True)
class _PendingStep:
    """A step that the threads are making."""

    step: int
    rounds: tuple[_PendingRound, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the step's pixels."""
        return sum(round_.pixels_TCEE.nbytes for round_ in self.rounds)


def split_tiles(num_tiles: int, num_ranks: int) -> tuple[int, ...]:
    """Returns the tiles of each rank, as even as possible, the larger shares first.

    >>> split_tiles(7, 4)
    (2, 2, 2, 1)
    """
    share, extra = divmod(num_tiles, num_ranks)
    return tuple(share + (rank < extra) for rank in range(num_ranks))


def group_rounds(packs: Sequence[PackPlan], max_tiles: int) -> list[_PackedRound]:
    """Groups packs in order into rounds of at most `max_tiles` tiles; a larger pack is one alone."""
    rounds: list[list[PackPlan]] = []
    tiles = 0
    for pack in packs:
        if not rounds or tiles + pack.num_tiles > max_tiles:
            rounds.append([])
            tiles = 0
        rounds[-1].append(pack)
        tiles += pack.num_tiles
    return [tuple(round_) for round_ in rounds]


class Loader(Iterator[StepBatch]):
    """Yields the batches of the given steps. Close it when done.

    Args:
        plan: of the stage.
        encoder: of the stage.
        share: this rank's part of every step.
        loader: threads and memory.
        max_tiles_in_flight: of a round.
        steps: numbers of the steps to make, ascending, counted from 0.

    Raises (while iterating):
        ShardError: a shard changed or vanished since it was indexed.
    """

    def __init__(
        self,
        plan: DataPlan,
        encoder: SampleEncoder,
        share: RankShare,
        loader: LoaderConfig,
        max_tiles_in_flight: int,
        steps: Iterable[int],
    ) -> None:
        self._plan = plan
        self._tile_size = encoder.spec.tile_size
        self._share = share
        self._max_tiles = max_tiles_in_flight
        self._packs = PackLoader(plan, encoder, loader.max_image_pixels)
        self._steps = iter(steps)
        # Without workers nothing runs ahead: a step is made when it is asked for.
        self._steps_ahead = loader.prefetch_steps if loader.workers else 0
        self._max_bytes = round(loader.prefetch_gib * 2**30)
        self._threads = ThreadPoolExecutor(loader.workers, "nvlm-data") if loader.workers else None
        self._pending: deque[_PendingStep] = deque()
        self._planned: _PlannedStep | None = None

    def __next__(self) -> StepBatch:
        try:
            while len(self._pending) <= self._steps_ahead:
                if self._planned is None:
                    self._planned = self._plan_next()
                if self._planned is None or not self._has_room(self._planned.rounds):
                    break
                self._pending.append(self._start(self._planned))
                self._planned = None
            if not self._pending:
                raise StopIteration
            return _collect(self._pending.popleft())
        except BaseException:
            self.close()
            raise

    def _plan_next(self) -> _PlannedStep | None:
        """Returns the next step and its rounds; None after the last."""
        step = next(self._steps, None)
        if step is None:
            return None
        planned = self._plan.step(step, self._share.dp_size)
        rounds = group_rounds(planned.packs[self._share.dp_rank], self._max_tiles)
        return _PlannedStep(step, rounds, planned.pack_length)

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stops the background threads; what they were making is dropped."""
        self._pending.clear()
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)

    @property
    def buffered_bytes(self) -> int:
        """Bytes of the pixels of the steps made ahead, finished or not."""
        return sum(step.num_bytes for step in self._pending)

    def _has_room(self, rounds: Sequence[_PackedRound]) -> bool:
        """Says whether a step's pixels fit beside those that wait; a step alone always does."""
        tiles = sum(self._split(round_)[self._share.replica_rank] for round_ in rounds)
        num_bytes = 3 * self._tile_size**2 * tiles
        return not self._pending or self.buffered_bytes + num_bytes <= self._max_bytes

    def _split(self, round_: _PackedRound) -> tuple[int, ...]:
        """Returns the round's tiles for each of the replica's ranks."""
        return split_tiles(sum(pack.num_tiles for pack in round_), self._share.replica_size)

    def _start(self, planned: _PlannedStep) -> _PendingStep:
        """Hands a step's packs to the threads."""
        length = planned.pack_length
        rounds = tuple(self._start_round(round_, length) for round_ in planned.rounds)
        return _PendingStep(planned.step, rounds)

    def _start_round(self, round_: _PackedRound, length: int) -> _PendingRound:
        import torch

        edge = self._tile_size
        split = self._split(round_)
        own_first = sum(split[: self._share.replica_rank])
        own_last = own_first + split[self._share.replica_rank]
        # numpy asks for huge pages, and nothing is zeroed: every tile is written, or fails.
        pixels_TCEE = np.empty((own_last - own_first, 3, edge, edge), dtype=np.uint8)
        futures: list[Future[LoadedPack]] = []
        pack_first = 0
        for pack in round_:
            first = min(max(own_first, pack_first), own_last)
            last = min(max(own_first, pack_first + pack.num_tiles), own_last)
            own_TCEE = pixels_TCEE[first - own_first : last - own_first]
            futures.append(self._submit(PackJob(pack, length, first - pack_first, own_TCEE)))
            pack_first += pack.num_tiles
        return _PendingRound(split, torch.from_numpy(pixels_TCEE), tuple(futures))

    def _submit(self, job: PackJob) -> Future[LoadedPack]:
        if self._threads is not None:
            return self._threads.submit(self._packs.load, job)
        done: Future[LoadedPack] = Future()
        done.set_result(self._packs.load(job))
        return done


def _collect(pending: _PendingStep) -> StepBatch:
    """Waits for a step's packs; an error of a thread is raised here."""
    rounds: list[Round] = []
    failures: list[SampleFailure] = []
    for round_number, round_ in enumerate(pending.rounds):
        loaded = [future.result() for future in round_.packs]
        for number, pack in enumerate(loaded):
            failures += [
                SampleFailure(round_number, number, failure.sample, failure.reason)
                for failure in pack.failures
            ]
        microbatches = tuple(pack.microbatch for pack in loaded)
        rounds.append(Round(microbatches, round_.tile_split, round_.pixels_TCEE))
    return StepBatch(pending.step, tuple(rounds), tuple(failures))
