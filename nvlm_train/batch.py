"""What the data floor hands to the model: plans (numbers only) and batches (tensors).

Shape legend: S tokens of a pack, L trained positions of a pack, T tiles, E tile edge in pixels.
A *pack* is one sequence made of whole samples; it is one microbatch. All packs of a step have one length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class SampleRef:
    """It says where a sample of the blend lies, and has the sizes that packing needs."""

    source: int
    """Index of the source in the blend."""
    shard: int
    """Index of the shard within its source."""
    row: int
    """Row in the shard's index."""
    num_tokens: int
    """Decoder tokens, image tokens included."""
    num_tiles: int
    """Tiles of all its images, thumbnails included."""


@dataclass(frozen=True, slots=True)
class PackPlan:
    """The samples share one sequence; there are none when a step has fewer packs than data-parallel ranks."""

    samples: tuple[SampleRef, ...]

    @property
    def num_tokens(self) -> int:
        return sum(sample.num_tokens for sample in self.samples)

    @property
    def num_tiles(self) -> int:
        return sum(sample.num_tiles for sample in self.samples)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """It is all of one optimizer step, the same on every rank; `packs[dp_rank]` are that rank's packs."""

    step: int
    packs: tuple[tuple[PackPlan, ...], ...]
    pack_length: int
    """Every pack is filled up with padding to this many tokens."""


@dataclass(frozen=True, slots=True)
class RankShare:
    """It says which part of a step is this rank's.

    A model replica is the TP x PP ranks that hold one copy of the model; its ranks share the tiles.
    """

    dp_rank: int = 0
    dp_size: int = 1
    replica_rank: int = 0
    replica_size: int = 1


@dataclass(frozen=True, slots=True)
class SampleInfo:
    """It says where a sample inside a microbatch comes from."""

    source: int
    shard: str
    key: str


@dataclass(frozen=True)
class CrossContext:
    """What a pack's cross-attention reads is laid out here: each cross-routed tile's tag, then its features.

    Shape legend: C tokens of the context, V spans.
    """

    length: int
    """C."""
    tile_positions: Tensor
    """int64 [cross-routed tiles * tokens per tile]: where in the context their features stand."""
    tag_positions: Tensor
    """int64 [n]: where tags stand; none in NVLM-X."""
    tag_ids: Tensor
    """int64 [n]."""
    spans: Tensor
    """int32 [V, 4]: the pack's tokens [start, stop) see the context's [first, last); ascending in
    both halves of a sample. A token outside every span sees nothing."""
    decoder_tiles: Tensor
    """int64: which of the pack's tiles go to the decoder."""
    cross_tiles: Tensor
    """int64: which are cross-routed."""


@dataclass(frozen=True)
class Microbatch:
    """A pack is ready for the model here. Tensors live on the CPU until the step needs them."""

    token_ids_S: Tensor
    """int64 [S]; image positions and padding hold the pad id."""
    image_positions: Tensor
    """int64 [decoder-routed tiles * tokens per tile]: the positions that features replace, in tile order."""
    label_positions_L: Tensor
    """int64 [L]: positions whose *next* token is trained; ascending."""
    label_ids_L: Tensor
    """int64 [L]: the token to predict at each of them."""
    label_samples_L: Tensor
    """int64 [L]: index into `samples`."""
    cu_seqlens: Tensor
    """int32 [segments + 1]: where samples begin; the padding is the last segment, so it ends with S."""
    samples: tuple[SampleInfo, ...]
    num_tiles: int
    context: CrossContext | None = None
    """None when no tile of the pack is cross-routed."""


@dataclass(frozen=True)
class Round:
    """The tiles of these microbatches are encoded together before the pipeline schedule runs.

    The round's tiles are numbered in microbatch, image, tile order. Replica rank r owns
    `tile_split[r]` of them, contiguous, after those of the ranks before it.
    """

    microbatches: tuple[Microbatch, ...]
    tile_split: tuple[int, ...]
    pixels_TCEE: Tensor
    """uint8 [own T, 3, E, E]: only this rank's tiles; a tile that could not be decoded is zero."""


@dataclass(frozen=True, slots=True)
class SampleFailure:
    """This rank could not decode an image of the sample: it is counted, and trained by nobody."""

    round: int
    microbatch: int
    sample: int
    reason: str


@dataclass(frozen=True)
class StepBatch:
    """It is one rank's view of one optimizer step."""

    step: int
    rounds: tuple[Round, ...]
    failures: tuple[SampleFailure, ...]
    """Found by this rank; ranks of a replica exchange them before the step."""
