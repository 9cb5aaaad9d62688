"""A step on the device, and in numbers what the plan knows of it: what the model reads.

Lengths, spans and counts are numbers of the host, because they follow from the plan; tensors lie on the
device before the step begins. So no layer ever asks the device for a number, which would make the host
wait until all work that was queued before is done.

Shape legend: S tokens of a pack, L its positions whose logits are wanted, C tokens of its cross-attention
context, T tiles, E tile edge in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from nvlm_train.batch import StepBatch


class Span(NamedTuple):
    """A pack's tokens [start, stop) see the context's [first, last)."""

    start: int
    stop: int
    first: int
    last: int


Spans = tuple[Span, ...]


@dataclass(frozen=True)
class DeviceContext:
    """What a pack's cross-attention reads (`nvlm_train.batch.CrossContext`)."""

    length: int
    """C."""
    spans: Spans
    """Ascending and disjoint in their tokens."""
    tile_positions: Tensor
    """int64 [cross-routed tiles * tokens per tile]."""
    tag_positions: Tensor
    """int64 [n]."""
    tag_ids: Tensor
    """int64 [n]."""
    decoder_tiles: Tensor
    """int64 [decoder-routed tiles]."""
    cross_tiles: Tensor
    """int64 [cross-routed tiles]."""


@dataclass(frozen=True)
class Labels:
    """What training wants of a pack's logits, one by one as `DevicePack.wanted_L`."""

    ids_L: Tensor
    """int64 [L]: the token to predict."""
    samples_L: Tensor
    """int64 [L]: its sample, numbered through all packs of the step."""
    sources_L: Tensor
    """int64 [L]: that sample's source, as an index into the blend."""
    weights_L: Tensor
    """fp32 [L]: 1, and 0 for the one position of a pack that has no labels."""


@dataclass(frozen=True)
class DevicePack:
    """One microbatch."""

    lengths: tuple[int, ...]
    """Tokens of each segment; the padding is the last one. They add up to S."""
    wanted: tuple[int, ...]
    """Positions whose logits are wanted: at least one, ascending."""
    num_tiles: int
    token_ids_S: Tensor
    """int64 [S]."""
    position_ids_S: Tensor
    """int64 [S]: a token's place in its segment."""
    image_positions: Tensor
    """int64 [decoder-routed tiles * tokens per tile]."""
    cu_seqlens: Tensor
    """int32 [segments + 1]."""
    wanted_L: Tensor
    """int64 [L]."""
    context: DeviceContext | None
    labels: Labels | None
    """None where nothing is trained."""


@dataclass(frozen=True)
class DeviceRound:
    """Packs whose tiles are encoded together."""

    packs: tuple[DevicePack, ...]
    tile_split: tuple[int, ...]
    """Tiles of each rank of the replica."""
    pixels_TCEE: Tensor
    """uint8 [own T, 3, E, E]: this rank's tiles."""
    relayed: int
    """Rows of context that one pipeline stage sends to the next with each pack: one number for all packs of
    a round, so that stages need not exchange shapes."""


@dataclass(frozen=True)
class DeviceStep:
    """One rank's view of one optimizer step."""

    host: StepBatch
    rounds: tuple[DeviceRound, ...]
    failed: Tensor
    """int32 [samples of the replica]: 1 where this rank could not decode an image of the sample."""
    counts: Tensor
    """fp64: what this replica processes, in the order of the fields of `StepCounts`."""

    @property
    def step(self) -> int:
        return self.host.step
