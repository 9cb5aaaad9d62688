"""How many tokens, tiles and labels each sample of a shard has under one stage's encoding.

Computed once per (shard, encoding) and cached beside the index, so that plans are pure arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nvlm_train.data.encoding import ImageSize, Layout, SampleEncoder
from nvlm_train.data.index import read_beside, write_beside
from nvlm_train.data.reader import ShardReader
from nvlm_train.data.records import Turn

_CHUNK = 2048
"""Samples tokenised together."""
_FINGERPRINT_CHARS = 16


@dataclass(frozen=True)
class ShardLengths:
    """Row i belongs to row i of the shard's index."""

    num_tokens: NDArray[np.int32]
    """[N], image tokens included; 0 for an unusable sample."""
    num_tiles: NDArray[np.int32]
    """[N], thumbnails included."""
    num_trained: NDArray[np.int32]
    """[N] labels; 0 exactly for unusable samples."""
    is_truncated: NDArray[np.bool_]
    """[N]: cut at sequence_length."""
    reasons: dict[int, str]
    """Row -> why the sample is unusable; the text before ":" is its kind."""


@dataclass(slots=True)
class _Draft:
    """A sample on its way: its record, and its pieces at the full tile limit."""

    row: int
    record: bytes
    sizes: list[ImageSize]
    turns: tuple[Turn, ...]
    layout: Layout


def load_lengths(reader: ShardReader, encoder: SampleEncoder) -> ShardLengths:
    """Lengths of a shard from the cache beside it, else computed and stored there."""
    suffix = f".lengths-{encoder.fingerprint[:_FINGERPRINT_CHARS]}"
    cached = read_beside(reader.shard, suffix)
    if cached is not None and str(cached.get("digest")) == reader.index.digest:
        texts = cached["reason_texts"].tolist()
        return ShardLengths(
            num_tokens=cached["num_tokens"].astype(np.int32),
            num_tiles=cached["num_tiles"].astype(np.int32),
            num_trained=cached["num_trained"].astype(np.int32),
            is_truncated=cached["is_truncated"].astype(np.bool_),
            reasons=dict(zip(cached["reason_rows"].tolist(), texts, strict=True)),
        )
    lengths = compute_lengths(reader, encoder)
    arrays: dict[str, NDArray[np.generic]] = {
        "digest": np.array(reader.index.digest),
        "num_tokens": lengths.num_tokens,
        "num_tiles": lengths.num_tiles,
        "num_trained": lengths.num_trained,
        "is_truncated": lengths.is_truncated,
        "reason_rows": np.array(list(lengths.reasons), dtype=np.int64),
        "reason_texts": np.array(list(lengths.reasons.values()), dtype=np.str_),
    }
    write_beside(reader.shard, suffix, arrays)
    return lengths


def compute_lengths(reader: ShardReader, encoder: SampleEncoder) -> ShardLengths:
    """Reads every record of the shard once; images only count through their indexed sizes."""
    count = len(reader.index)
    lengths = ShardLengths(
        num_tokens=np.zeros(count, dtype=np.int32),
        num_tiles=np.zeros(count, dtype=np.int32),
        num_trained=np.zeros(count, dtype=np.int32),
        is_truncated=np.zeros(count, dtype=np.bool_),
        reasons={},
    )
    for start in range(0, count, _CHUNK):
        drafts = list(_drafts(reader, encoder, range(start, min(start + _CHUNK, count)), lengths))
        known = _tokenise(drafts, encoder)
        for draft in drafts:
            _measure(reader, encoder, draft, known, lengths)
    return lengths


def _drafts(
    reader: ShardReader, encoder: SampleEncoder, rows: Sequence[int], lengths: ShardLengths
) -> Iterator[_Draft]:
    for row in rows:
        try:
            record, sizes = reader.record(row), reader.index.image_sizes(row)
            turns = encoder.turns(reader.key(row), record, sizes)
        except ValueError as error:
            lengths.reasons[row] = str(error)
            continue
        layout = encoder.layout(turns, sizes, encoder.spec.tiling.max_tiles)
        yield _Draft(row, record, sizes, turns, layout)


def _tokenise(drafts: Sequence[_Draft], encoder: SampleEncoder) -> dict[str, list[int]]:
    """Ids of every different text of these samples."""
    texts = list(
        {
            piece.text: None
            for draft in drafts
            for piece in draft.layout.pieces
            if piece.text and not piece.after
        }
    )
    return dict(zip(texts, encoder.tokenizer.encode_batch(texts), strict=True))


def _measure(
    reader: ShardReader,
    encoder: SampleEncoder,
    draft: _Draft,
    known: dict[str, list[int]],
    lengths: ShardLengths,
) -> None:
    """Counts a sample's tokens; only one that does not fit is encoded in full, with fewer tiles."""
    row = draft.row
    counts = [(len(encoder.ids(piece, known)), piece.role) for piece in draft.layout.pieces]
    num_tokens = sum(count for count, _ in counts)
    num_trained = sum(count for count, role in counts if role == "trained")
    num_tiles = sum(image.num_tiles for image in draft.layout.images)
    if num_tokens > encoder.spec.sequence_length or num_trained == 0:
        try:
            encoded = encoder.encode(reader.key(row), draft.record, draft.sizes)
        except ValueError as error:
            lengths.reasons[row] = str(error)
            return
        num_tokens, num_trained = len(encoded.token_ids), len(encoded.label_ids)
        num_tiles = encoded.num_tiles
        lengths.is_truncated[row] = encoded.is_truncated
    lengths.num_tokens[row] = num_tokens
    lengths.num_tiles[row] = num_tiles
    lengths.num_trained[row] = num_trained
