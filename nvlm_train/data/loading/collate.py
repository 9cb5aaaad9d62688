"""Encoded samples into the tensors of one microbatch. Shape legend: see `nvlm_train.batch`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nvlm_train.batch import CrossContext, Microbatch, SampleInfo
from nvlm_train.data.samples.encoded import EncodedSample


def pack_samples(
    samples: Sequence[EncodedSample], infos: Sequence[SampleInfo], length: int, pad_id: int
) -> Microbatch:
    """Makes one pack of `length` tokens: the samples one after the other, then padding.

    `cu_seqlens` keeps samples from attending to each other; the padding is a segment of its own.

    Raises:
        ValueError: the samples are longer than the pack.
    """
    import torch

    starts = np.cumsum([0, *(len(sample.token_ids) for sample in samples)])
    used = int(starts[-1])
    if used > length:
        raise ValueError(f"samples of {used} tokens do not fit a pack of {length}")
    ends = starts if used == length else np.append(starts, length)
    offsets = starts[:-1].tolist()
    shifted = list(zip(samples, offsets, strict=True))
    empty = np.empty(0, dtype=np.int64)
    padding = np.full(length - used, pad_id, dtype=np.int64)
    labels_of = [np.full(len(sample.label_ids), number) for number, sample in enumerate(samples)]

    def joined(parts: Sequence[NDArray[np.int64]]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([empty, *parts]))

    return Microbatch(
        token_ids_S=joined([*(sample.token_ids for sample in samples), padding]),
        image_positions=joined([sample.image_positions + offset for sample, offset in shifted]),
        label_positions_L=joined([sample.label_positions + offset for sample, offset in shifted]),
        label_ids_L=joined([sample.label_ids for sample in samples]),
        label_samples_L=joined(labels_of),
        cu_seqlens=torch.from_numpy(ends.astype(np.int32)),
        samples=tuple(infos),
        num_tiles=sum(sample.num_tiles for sample in samples),
        context=_cross_context(samples, offsets),
    )


def _cross_context(samples: Sequence[EncodedSample], offsets: Sequence[int]) -> CrossContext | None:
    """Returns tags and slots of all cross-routed tiles, one after the other, and who sees which."""
    import torch

    is_cross_T = np.concatenate(
        [np.empty(0, dtype=np.bool_), *(sample.cross.is_cross_T for sample in samples)]
    )
    if not is_cross_T.any():
        return None
    tags = [tag for sample in samples for tag in sample.cross.tags]
    per_tile = samples[0].cross.tokens_per_tile
    edges = np.cumsum([0, *(len(tag) + per_tile for tag in tags)])
    spans: list[NDArray[np.int64]] = []
    first_tile = 0
    for sample, offset in zip(samples, offsets, strict=True):
        own = sample.cross.spans
        seen = edges[own[:, 2:] + first_tile]
        spans.append(np.concatenate([own[:, :2] + offset, seen], axis=1))
        first_tile += len(sample.cross.tags)

    def joined(parts: list[NDArray[np.int64]]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *parts]))

    starts = edges[:-1]
    return CrossContext(
        length=int(edges[-1]),
        tile_positions=joined([np.arange(stop - per_tile, stop) for stop in edges[1:]]),
        tag_positions=joined(
            [np.arange(start, start + len(tag)) for start, tag in zip(starts, tags, strict=True)]
        ),
        tag_ids=joined(tags),
        spans=torch.from_numpy(np.concatenate(spans).astype(np.int32)),
        decoder_tiles=torch.from_numpy(np.flatnonzero(~is_cross_T)),
        cross_tiles=torch.from_numpy(np.flatnonzero(is_cross_T)),
    )
