"""How many tokens, tiles and labels each sample of a shard has under one stage's encoding.

They are computed once per (shard, encoding) and stored beside the index: plans are pure arithmetic.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvlm_train.data.index.files import ArrayFile, IndexFiles, Texts
from nvlm_train.data.index.reader import ShardReader
from nvlm_train.data.index.shard_index import BESIDE
from nvlm_train.data.samples.encoder import SampleEncoder
from nvlm_train.data.shards.fields import OWN_FIELDS, FieldMapping
from nvlm_train.data.shards.tar import Shard

LENGTHS_VERSION = 2
_CHUNK = 2048
"""Samples tokenised together."""
_EXAMPLES = 3
"""Unusable samples of a kind that a summary names."""
_FINGERPRINT_CHARS = 16


@dataclass(frozen=True)
class ShardLengths:
    """The lengths of a shard's samples: row i belongs to row i of its index.

    The arrays are views of a mapped file.
    """

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

    def usable_rows(self) -> NDArray[np.int64]:
        """Returns the rows that can be drawn, ascending: int64 [usable]."""
        return np.flatnonzero(self.num_trained > 0)


@dataclass(frozen=True, slots=True)
class LengthsSummary:
    """A shard under one encoding in a few numbers: all that a plan keeps of it."""

    digest: str
    """Equal digests mean equal lengths of every sample."""
    num_usable: int
    num_truncated: int
    num_tokens: int
    num_trained: int
    num_tiles: int
    max_tiles: int
    """Tiles of the sample that has most."""
    unusable: dict[str, tuple[int, list[int]]]
    """Kind -> (how many samples, the first few rows)."""


def lengths_suffix(encoder: SampleEncoder, fields: FieldMapping) -> str:
    """Returns what follows the shard's own name in the name of its lengths file."""
    mapped = f"-{fields.digest}" if fields.digest else ""
    return f".lengths-{encoder.fingerprint[:_FINGERPRINT_CHARS]}{mapped}"


def load_lengths(
    reader: ShardReader, encoder: SampleEncoder, files: IndexFiles = BESIDE
) -> ShardLengths:
    """Returns the stored lengths of a shard; where there are none they are computed and stored."""
    suffix = lengths_suffix(encoder, reader.fields)
    stored = files.open(reader.shard, suffix)
    if stored is not None and _is_of(stored.facts, reader.index.digest):
        return _from_file(stored)
    lengths = compute_lengths(reader, encoder)
    facts = asdict(summarise(lengths)) | {
        "version": LENGTHS_VERSION,
        "index_digest": reader.index.digest,
    }
    files.write(reader.shard, suffix, facts, _arrays(lengths))
    return lengths


def lengths_summary(
    shard: Shard,
    index_digest: str,
    open_reader: Callable[[], ShardReader],
    encoder: SampleEncoder,
    files: IndexFiles = BESIDE,
    fields: FieldMapping = OWN_FIELDS,
) -> LengthsSummary:
    """Returns what the lengths say about the whole shard.

    Only where they are not stored the shard is opened, measured, and its lengths are stored.

    Raises:
        ShardError: the shard changed since it was indexed.
    """
    stored = read_lengths_summary(shard, index_digest, encoder, files, fields)
    if stored is not None:
        return stored
    lengths = load_lengths(open_reader(), encoder, files)
    return summarise(lengths)


def read_lengths_summary(
    shard: Shard,
    index_digest: str,
    encoder: SampleEncoder,
    files: IndexFiles = BESIDE,
    fields: FieldMapping = OWN_FIELDS,
) -> LengthsSummary | None:
    """Returns what the stored lengths say about the whole shard; None when they must be made again."""
    facts = files.facts(shard, lengths_suffix(encoder, fields))
    if facts is None or not _is_of(facts, index_digest):
        return None
    numbers = {name: facts[name] for name in LengthsSummary.__dataclass_fields__}
    return LengthsSummary(**numbers)


def summarise(lengths: ShardLengths) -> LengthsSummary:
    """Returns the few numbers of a shard."""
    digest = hashlib.sha256()
    unusable: dict[str, tuple[int, list[int]]] = {}
    for row, reason in lengths.reasons.items():
        count, rows = unusable.get(kind_of(reason), (0, []))
        unusable[kind_of(reason)] = (count + 1, [*rows, row][:_EXAMPLES])
    for values in (lengths.num_tokens, lengths.num_tiles, lengths.num_trained):
        digest.update(values.astype("<i4").tobytes())
    return LengthsSummary(
        digest=digest.hexdigest(),
        num_usable=int((lengths.num_trained > 0).sum()),
        num_truncated=int(lengths.is_truncated.sum()),
        num_tokens=int(lengths.num_tokens.sum(dtype=np.int64)),
        num_trained=int(lengths.num_trained.sum(dtype=np.int64)),
        num_tiles=int(lengths.num_tiles.sum(dtype=np.int64)),
        max_tiles=int(lengths.num_tiles.max(initial=0)),
        unusable=unusable,
    )


def kind_of(reason: str) -> str:
    """Returns what a reason has in common with others: the text before its first colon."""
    return reason.partition(":")[0]


def _is_of(facts: dict[str, Any], index_digest: str) -> bool:
    return facts.get("version") == LENGTHS_VERSION and facts["index_digest"] == index_digest


def _arrays(lengths: ShardLengths) -> dict[str, NDArray[Any]]:
    return {
        "num_tokens": lengths.num_tokens,
        "num_tiles": lengths.num_tiles,
        "num_trained": lengths.num_trained,
        "is_truncated": lengths.is_truncated,
        "reason_rows": np.array(list(lengths.reasons), dtype=np.int64),
        **Texts.pack(list(lengths.reasons.values())).arrays("reason_texts"),
    }


def _from_file(stored: ArrayFile) -> ShardLengths:
    arrays = stored.arrays
    texts = Texts.of(arrays, "reason_texts").tolist()
    return ShardLengths(
        num_tokens=arrays["num_tokens"],
        num_tiles=arrays["num_tiles"],
        num_trained=arrays["num_trained"],
        is_truncated=arrays["is_truncated"],
        reasons=dict(zip(arrays["reason_rows"].tolist(), texts, strict=True)),
    )


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
        rows = range(start, min(start + _CHUNK, count))
        for row, length in encoder.measure(rows, reader.sample):
            if length.problem is not None:
                lengths.reasons[row] = length.problem
            lengths.num_tokens[row] = length.num_tokens
            lengths.num_tiles[row] = length.num_tiles
            lengths.num_trained[row] = length.num_trained
            lengths.is_truncated[row] = length.is_truncated
    return lengths
