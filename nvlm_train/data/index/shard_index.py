"""The index beside a shard: where each sample's members lie and how large its images are.

One pass over a tar makes it; afterwards plans are arithmetic and samples are read by offset. Every
member carries a CRC-32, so bytes that changed since are noticed when they are read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from nvlm_train.data.index.files import ArrayFile, IndexFiles, Texts
from nvlm_train.data.shards.fields import OWN_FIELDS, FieldMapping
from nvlm_train.data.shards.scan import scan_tar
from nvlm_train.data.shards.tar import Shard, Stamp
from nvlm_train.errors import ShardError

INDEX_VERSION = 2
INDEX_SUFFIX = ".index"
_IMAGE_FIELDS = 5


BESIDE = IndexFiles()
"""The files lie beside the shards."""


@dataclass(frozen=True, slots=True)
class IndexSummary:
    """A shard in two numbers."""

    num_samples: int
    digest: str


@dataclass(frozen=True)
class ShardIndex:
    """N samples and M images of one shard, in tar order; arrays are views of a mapped file."""

    keys: Texts
    """[N]."""
    records: NDArray[np.int64]
    """[N, 3R]: offset, bytes and CRC-32 of KEY.json; 0 bytes when there is none. A field mapping
    may name R members instead."""
    first_image: NDArray[np.int64]
    """[N + 1]: sample i has images first_image[i] to first_image[i + 1]."""
    images: NDArray[np.int64]
    """[M, 5]: offset, bytes, CRC-32, width, height (upright); width 0 when it cannot be read."""
    problems: dict[int, str]
    """Image row -> why its header cannot be read."""
    stamp: Stamp
    digest: str
    """SHA-256 over names, places, CRCs and field mapping: equal digests mean equal contents."""

    def __len__(self) -> int:
        return len(self.keys)

    def image_rows(self, row: int) -> range:
        """Returns the rows of `images` that belong to the sample."""
        return range(int(self.first_image[row]), int(self.first_image[row + 1]))

    def image_sizes(self, row: int) -> list[tuple[int, int]]:
        """Returns (width, height) of each of the sample's images.

        Raises:
            ValueError: an image whose header cannot be read.
        """
        for image in self.image_rows(row):
            if image in self.problems:
                raise ValueError(self.problems[image])
        sizes = self.images[int(self.first_image[row]) : int(self.first_image[row + 1]), 3:]
        return [(width, height) for width, height in sizes.tolist()]


def load_index(
    shard: Shard, files: IndexFiles = BESIDE, fields: FieldMapping = OWN_FIELDS
) -> ShardIndex:
    """Returns the shard's stored index; a missing, damaged or outdated one is made again.

    Each field mapping has an index of its own.

    Raises:
        FileNotFoundError: the shard is missing.
        ShardError: the tar is torn or holds members that are refused.
    """
    stamp = shard.stamp()
    stored = files.open(shard, index_suffix(fields))
    if stored is not None and _is_of(stored.facts, stamp):
        return _from_file(stored)
    index = _build(shard, stamp, fields)
    files.write(shard, index_suffix(fields), _facts(index), _arrays(index))
    return index


def index_suffix(fields: FieldMapping) -> str:
    """Returns what follows the shard's own name in the name of its index file."""
    return f"{INDEX_SUFFIX}-{fields.digest}" if fields.digest else INDEX_SUFFIX


def index_state(
    shard: Shard, files: IndexFiles = BESIDE, fields: FieldMapping = OWN_FIELDS
) -> Literal["fresh", "missing", "stale"]:
    """Says whether `load_index` would find an index that belongs to the shard as it is now.

    Raises:
        FileNotFoundError: the shard is missing.
    """
    stamp = shard.stamp()
    facts = files.facts(shard, index_suffix(fields))
    if facts is None:
        return "missing"
    return "fresh" if _is_of(facts, stamp) else "stale"


def index_summary(
    shard: Shard, files: IndexFiles = BESIDE, fields: FieldMapping = OWN_FIELDS
) -> IndexSummary:
    """Returns what the index says about the whole shard; the index is made where it is not stored.

    Raises:
        FileNotFoundError: the shard is missing.
        ShardError: the tar is torn or holds members that are refused.
    """
    stored = read_summary(shard, files, fields)
    if stored is not None:
        return stored
    index = load_index(shard, files, fields)
    return IndexSummary(len(index), index.digest)


def read_summary(
    shard: Shard, files: IndexFiles = BESIDE, fields: FieldMapping = OWN_FIELDS
) -> IndexSummary | None:
    """Returns what the stored index says about the whole shard; None when it must be made again.

    Raises:
        FileNotFoundError: the shard is missing.
    """
    stamp = shard.stamp()
    facts = files.facts(shard, index_suffix(fields))
    if facts is None or not _is_of(facts, stamp):
        return None
    return IndexSummary(facts["num_samples"], facts["digest"])


def open_index(
    shard: Shard, files: IndexFiles = BESIDE, fields: FieldMapping = OWN_FIELDS
) -> ShardIndex | None:
    """Returns the stored index without a look at the shard; None where there is none."""
    stored = files.open(shard, index_suffix(fields))
    if stored is None or stored.facts.get("version") != INDEX_VERSION:
        return None
    return _from_file(stored)


def _build(shard: Shard, stamp: Stamp, fields: FieldMapping) -> ShardIndex:
    keys: list[str] = []
    records: list[tuple[int, ...]] = []
    images: list[tuple[int, int, int, int, int]] = []
    first_image, problems = [0], dict[int, str]()
    for sample in scan_tar(shard, fields):
        keys.append(sample.key)
        records.append(tuple(chain.from_iterable(sample.records)))
        for image in sample.images:
            if image.problem:
                problems[len(images)] = f"{image.problem} ({sample.key}.{image.suffix})"
            images.append((*image.place, image.width, image.height))
        first_image.append(len(images))
    if not keys:
        raise ShardError(
            f"shard={shard.path} holds no samples; remove it from the blend or write it again"
        )
    return ShardIndex(
        keys=Texts.pack(keys),
        records=np.array(records, dtype=np.int64).reshape(len(keys), -1),
        first_image=np.array(first_image, dtype=np.int64),
        images=np.array(images, dtype=np.int64).reshape(-1, _IMAGE_FIELDS),
        problems=problems,
        stamp=stamp,
        digest=_digest(keys, records, images, fields.digest),
    )


def _digest(
    keys: list[str],
    records: Sequence[tuple[int, ...]],
    images: Sequence[tuple[int, ...]],
    mapping: str,
) -> str:
    digest = hashlib.sha256("\0".join(keys).encode() + mapping.encode())
    digest.update(np.array(records, dtype="<i8").tobytes())
    digest.update(np.array(images, dtype="<i8").tobytes())
    return digest.hexdigest()


def _facts(index: ShardIndex) -> dict[str, Any]:
    return {
        "version": INDEX_VERSION,
        "size": index.stamp.size,
        "stamp": index.stamp.version,
        "digest": index.digest,
        "num_samples": len(index),
    }


def _is_of(facts: Mapping[str, Any], stamp: Stamp) -> bool:
    """Says whether this version of the code wrote the index, for the shard as it is now."""
    return facts.get("version") == INDEX_VERSION and (
        (facts["size"], facts["stamp"]) == (stamp.size, stamp.version)
    )


def _arrays(index: ShardIndex) -> dict[str, NDArray[Any]]:
    return {
        "records": index.records,
        "first_image": index.first_image,
        "images": index.images,
        "problem_rows": np.array(list(index.problems), dtype=np.int64),
        **index.keys.arrays("keys"),
        **Texts.pack(list(index.problems.values())).arrays("problem_texts"),
    }


def _from_file(stored: ArrayFile) -> ShardIndex:
    arrays, facts = stored.arrays, stored.facts
    texts = Texts.of(arrays, "problem_texts").tolist()
    return ShardIndex(
        keys=Texts.of(arrays, "keys"),
        records=arrays["records"],
        first_image=arrays["first_image"],
        images=arrays["images"],
        problems=dict(zip(arrays["problem_rows"].tolist(), texts, strict=True)),
        stamp=Stamp(facts["size"], facts["stamp"]),
        digest=facts["digest"],
    )
