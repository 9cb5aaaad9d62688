"""Places packs on the device: what the plan decides becomes numbers of the host, the rest one copy.

Shape legend: see `nvlm_train.device_batch`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nvlm_train.batch import CrossContext, Microbatch, StepBatch
from nvlm_train.device_batch import (
    DeviceContext,
    DevicePack,
    DeviceRound,
    DeviceStep,
    Labels,
    Span,
    Spans,
)
from nvlm_train.parallel.topology import Topology
from nvlm_train.parallel.transfer import send, send_pixels
from nvlm_train.pipeline.step_counts import count_replica

Arrays = dict[str, NDArray[Any]]
"""By the names of fields."""


@dataclass(frozen=True)
class _HostPack:
    """A pack before its arrays are sent."""

    microbatch: Microbatch
    lengths: tuple[int, ...]
    wanted: tuple[int, ...]
    own: Arrays
    context: Arrays
    labels: Arrays

    @property
    def arrays(self) -> Iterator[NDArray[Any]]:
        for each in (self.own, self.context, self.labels):
            yield from each.values()


def place_packs(
    microbatches: Sequence[Microbatch], wanted: Sequence[NDArray[np.int64]]
) -> tuple[DevicePack, ...]:
    """Places packs of which nothing is trained.

    Args:
        microbatches: on the host.
        wanted: by pack, ascending positions whose logits are wanted, at least one.
    """
    packs = [
        _describe(each, positions, {}) for each, positions in zip(microbatches, wanted, strict=True)
    ]
    sent = iter(send([array for pack in packs for array in pack.arrays]))
    return tuple(_placed(pack, sent) for pack in packs)


def place_step(batch: StepBatch, skipped: Sequence[int], topology: Topology) -> DeviceStep:
    """Places a step. Called by every rank; it waits neither for the device nor for other ranks.

    Args:
        batch: this rank's view of it.
        skipped: numbers of the samples that this rank could not decode, in the order of the step's packs.
        topology: this rank's place.
    """
    first, rounds = 0, []
    for round_ in batch.rounds:
        packs = []
        for microbatch in round_.microbatches:
            packs.append(_trained(microbatch, first))
            first += len(microbatch.samples)
        rounds.append(packs)
    failed = np.zeros(first, dtype=np.int32)
    failed[list(skipped)] = 1
    counts = np.array(count_replica(batch), dtype=np.float64)
    arrays = [array for packs in rounds for pack in packs for array in pack.arrays]
    sent = iter(send([failed, counts, *arrays]))
    failed_there, counts_there = next(sent), next(sent)
    placed = tuple(
        DeviceRound(
            packs=tuple(_placed(pack, sent) for pack in packs),
            tile_split=round_.tile_split,
            pixels_TCEE=send_pixels(round_.pixels_TCEE),
            relayed=relayed_rows(round_.microbatches, topology),
        )
        for round_, packs in zip(batch.rounds, rounds, strict=True)
    )
    return DeviceStep(batch, placed, failed_there, counts_there)


def relayed_rows(microbatches: Sequence[Microbatch], topology: Topology) -> int:
    """Counts the rows of context that stages send: the longest context, in equal parts for TP ranks."""
    longest = max((each.context.length for each in microbatches if each.context), default=0)
    return -(-longest // topology.tensor_size) * topology.tensor_size


def _trained(microbatch: Microbatch, first_sample: int) -> _HostPack:
    """Describes a pack that is trained on.

    One without labels wants position 0, with weight zero. So every pack has a backward, and no pipeline
    stage and no collective waits for one in vain.
    """
    positions, samples = microbatch.label_positions_L.numpy(), microbatch.label_samples_L.numpy()
    sources = np.array([sample.source for sample in microbatch.samples], dtype=np.int64)
    if len(positions):
        labels = {
            "ids_L": microbatch.label_ids_L.numpy(),
            "samples_L": samples + first_sample,
            "sources_L": sources[samples],
            "weights_L": np.ones(len(positions), dtype=np.float32),
        }
        return _describe(microbatch, positions, labels)
    nothing = np.zeros(1, dtype=np.int64)
    labels = {"ids_L": nothing, "samples_L": nothing, "sources_L": nothing}
    return _describe(microbatch, nothing, labels | {"weights_L": np.zeros(1, dtype=np.float32)})


def _describe(microbatch: Microbatch, wanted: NDArray[np.int64], labels: Arrays) -> _HostPack:
    bounds = microbatch.cu_seqlens.numpy()
    lengths = np.diff(bounds)
    context = microbatch.context
    return _HostPack(
        microbatch=microbatch,
        lengths=tuple(lengths.tolist()),
        wanted=tuple(wanted.tolist()),
        own={
            "token_ids_S": microbatch.token_ids_S.numpy(),
            "position_ids_S": np.arange(bounds[-1], dtype=np.int64)
            - np.repeat(bounds[:-1].astype(np.int64), lengths),
            "image_positions": microbatch.image_positions.numpy(),
            "cu_seqlens": bounds,
            "wanted_L": wanted,
        },
        context={} if context is None else {name: getattr(context, name).numpy() for name in _SENT},
        labels=labels,
    )


_SENT = ("tile_positions", "tag_positions", "tag_ids", "decoder_tiles", "cross_tiles")


def _placed(pack: _HostPack, sent: Iterator[Tensor]) -> DevicePack:
    def taken(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
        return {name: next(sent) for name in arrays}

    own, context, labels = taken(pack.own), taken(pack.context), taken(pack.labels)
    host = pack.microbatch.context
    return DevicePack(
        lengths=pack.lengths,
        wanted=pack.wanted,
        num_tiles=pack.microbatch.num_tiles,
        context=None if host is None else DeviceContext(host.length, _spans(host), **context),
        labels=Labels(**labels) if labels else None,
        **own,
    )


def _spans(context: CrossContext) -> Spans:
    return tuple(Span(*row) for row in context.spans.numpy().tolist())
