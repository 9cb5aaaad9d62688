"""Makes the features of a round while the round before it trains, on a stream of its own on a GPU.

The encoder is frozen, so features depend on nothing that training changes: made early they are the same bits.
What is early fills the time in which the GPU has nothing else to do, in pipeline bubbles and while it waits
for its host or for other ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nvlm_train.device_batch import DeviceRound
from nvlm_train.parallel.streams import SideStream
from nvlm_train.parallel.topology import Topology
from nvlm_train.vision.encoder import VisionEncoder
from nvlm_train.vision.tile_parallel import encode_round


@dataclass(frozen=True)
class _Started:
    """Features that the side stream makes, or has made."""

    round_: DeviceRound
    features: list[Tensor] | None
    start: Any
    end: Any
    """The side stream's marks before and behind them; None on a CPU."""


class FeatureSource:
    """Encodes rounds for one model replica.

    Rounds that `expect` has named are encoded one ahead, in their order: as `of` returns one's features it
    begins with the next. Every rank of the replica names the same rounds, since encoding them is collective.
    At most two rounds' pixels and features are on a GPU at once.

    Args:
        encoder: a whole one.
        topology: this rank's place.
        side: where features of expected rounds are made.
    """

    def __init__(
        self, encoder: VisionEncoder, topology: Topology, side: SideStream | None = None
    ) -> None:
        self.encoder = encoder
        self.topology = topology
        self.side = side or SideStream()
        self.around: Callable[[], AbstractContextManager[None]] = nullcontext
        """Entered while the caller of `of` waits for features, to take its time."""
        self._expected: deque[DeviceRound] = deque()
        self._started: _Started | None = None
        self._marks: list[tuple[Any, Any]] = []

    def expect(self, rounds: Iterable[DeviceRound]) -> None:
        """Names rounds that `of` will be asked for, in this order. Called by every rank of the replica."""
        self._expected.extend(rounds)

    def of(self, round_: DeviceRound) -> list[Tensor] | None:
        """Returns each pack's features. Called by every rank of the replica.

        Returns:
            On the first pipeline stage, per pack [T, tokens per tile, feature size] in the encoder's dtype;
            None on the other stages.
        """
        with self.around():
            if self._started is not None and self._started.round_ is round_:
                features = self._finished(self._started)
                self._marks.append((self._started.start, self._started.end))
                self._started = None
            else:
                features = encode_round(self.encoder, round_, self.topology)
        if self._expected and self._expected[0] is round_:
            self._expected.popleft()
            self._start_next()
        return features

    def read_beside(self) -> float:
        """Returns the seconds that features took on the side stream, of those used since the last call.

        It waits for nothing: a step has read its loss by then, which came behind its features.
        """
        marks, self._marks = self._marks, []
        return sum(start.elapsed_time(end) / 1e3 for start, end in marks if end is not None)

    def _start_next(self) -> None:
        if not self._expected:
            return
        round_ = self._expected[0]
        with self.side.behind_training():
            start = self.side.mark()
            features = encode_round(self.encoder, round_, self.topology)
            self._started = _Started(round_, features, start, self.side.mark())

    def _finished(self, started: _Started) -> list[Tensor] | None:
        """Lets the training stream wait for features, and keeps their memory until it has used them."""
        self.side.wait_for(started.end, started.features or ())
        return started.features
