"""Makes sources of numbers alone: stored indexes and lengths of samples that need not be drawn or written.

The files are the real ones and are opened as a run opens them; only the tars are empty (sparse).
Lengths follow three kinds of material: captions (1 tile), documents (2 to 7 tiles), chats (text).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nvlm_train.data.index.files import Texts, write_arrays
from nvlm_train.data.index.lengths import LENGTHS_VERSION, ShardLengths, summarise
from nvlm_train.data.index.shard_index import INDEX_SUFFIX, INDEX_VERSION

TILE_TOKENS = 256
"""Of a tile of 448 pixels after the pixel shuffle (NVLM 1.0, section 3.1)."""
TAG_TOKENS = 6
"""A tile tag, about."""
FINGERPRINT = "benchmark" + "0" * 55
LENGTHS_SUFFIX = f".lengths-{FINGERPRINT[:16]}"

Kind = Callable[[np.random.Generator, int, int], tuple[NDArray[np.int64], NDArray[np.int64]]]
"""(numbers, how many samples, sequence length) -> (text tokens, tiles)."""


class NoEncoder:
    """Stands where an encoder's fingerprints are asked for; all lengths are stored already."""

    fingerprint = tokens_fingerprint = FINGERPRINT


def captions(
    numbers: np.random.Generator, count: int, sequence_length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns lengths of captions: one tile and a sentence or two."""
    return numbers.lognormal(3.4, 0.5, count).astype(np.int64) + 20, np.ones(count, dtype=np.int64)


def documents(
    numbers: np.random.Generator, count: int, sequence_length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns lengths of documents: 3 to 7 tiles as far as they fit (seven most often), and their text."""
    text = numbers.lognormal(5.0, 0.6, count).astype(np.int64) + 20
    tiles = numbers.choice([3, 4, 5, 7], count, p=[0.15, 0.15, 0.2, 0.5])
    text = np.minimum(text, sequence_length // 3)
    return text, np.minimum(tiles, (sequence_length - text) // (TILE_TOKENS + TAG_TOKENS))


def chats(
    numbers: np.random.Generator, count: int, sequence_length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns lengths of chats: text only, with a long tail."""
    return numbers.lognormal(5.6, 0.9, count).astype(np.int64) + 30, np.zeros(count, dtype=np.int64)


KINDS: dict[str, Kind] = {"captions": captions, "documents": documents, "chats": chats}


def make_lengths(kind: str, count: int, sequence_length: int, seed: int) -> ShardLengths:
    """Returns the lengths of a shard of this kind."""
    text, tiles = KINDS[kind](np.random.default_rng(seed), count, sequence_length)
    tokens = np.minimum(text + tiles * (TILE_TOKENS + TAG_TOKENS), sequence_length)
    return ShardLengths(
        num_tokens=tokens.astype(np.int32),
        num_tiles=tiles.astype(np.int32),
        num_trained=np.maximum(text // 2, 1).astype(np.int32),
        is_truncated=np.zeros(count, dtype=np.bool_),
        reasons={},
    )


def write_source(
    root: Path, kind: str, num_shards: int, rows: int, sequence_length: int, distinct: int
) -> tuple[str, ...]:
    """Writes a source's files; shards beyond `distinct` are hard links to the first ones.

    Returns the shards' names.
    """
    names = tuple(f"{kind}-{number:06d}.tar" for number in range(num_shards))
    for number, name in enumerate(names):
        if number < distinct:
            _write_shard(root / name, kind, rows, sequence_length, number)
            continue
        for suffix in ("", INDEX_SUFFIX, LENGTHS_SUFFIX):
            os.link(root / (names[number % distinct] + suffix), root / (name + suffix))
    return names


def _write_shard(path: Path, kind: str, rows: int, sequence_length: int, seed: int) -> None:
    with path.open("wb") as stream:
        stream.truncate(rows * 100_000)
    status = path.stat()
    digest = hashlib.sha256(f"{kind}-{seed}".encode()).hexdigest()
    lengths = make_lengths(kind, rows, sequence_length, seed)
    facts = {
        "version": INDEX_VERSION, "size": status.st_size, "stamp": str(status.st_mtime_ns),
        "digest": digest, "num_samples": rows,
    }  # fmt: skip
    places = np.zeros((rows, 3), dtype=np.int64)
    places[:, 0] = np.arange(rows) * 100_000
    images = np.zeros((rows, 5), dtype=np.int64)
    no_texts = Texts.pack([]).arrays("problem_texts")
    write_arrays(
        path.with_name(path.name + INDEX_SUFFIX), facts,
        {
            "records": places, "images": images, "first_image": np.arange(rows + 1),
            "problem_rows": np.empty(0, dtype=np.int64), **no_texts,
            **Texts.pack([f"{kind}-{seed}-{row}" for row in range(rows)]).arrays("keys"),
        },
    )  # fmt: skip
    write_arrays(
        path.with_name(path.name + LENGTHS_SUFFIX),
        asdict(summarise(lengths)) | {"version": LENGTHS_VERSION, "index_digest": digest},
        {
            "num_tokens": lengths.num_tokens, "num_tiles": lengths.num_tiles,
            "num_trained": lengths.num_trained, "is_truncated": lengths.is_truncated,
            "reason_rows": np.empty(0, dtype=np.int64), **Texts.pack([]).arrays("reason_texts"),
        },
    )  # fmt: skip
