"""The index beside a shard: where each sample's members lie and how large its images are.

One pass over a tar makes it; afterwards plans are arithmetic and samples are read by offset. Every
member carries a CRC-32, so bytes that changed since are noticed when they are read.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import secrets
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from nvlm_train.data.shards import LocalShard, Shard, Stamp
from nvlm_train.data.tar_scan import scan_tar
from nvlm_train.errors import ShardError

INDEX_VERSION = 1
INDEX_SUFFIX = ".index"
_RECORD_FIELDS = 3
_IMAGE_FIELDS = 5

_log = logging.getLogger(__name__)
_warned_directories: set[str] = set()


@dataclass(frozen=True)
class ShardIndex:
    """N samples and M images of one shard, in tar order."""

    keys: NDArray[np.str_]
    """[N]."""
    records: NDArray[np.int64]
    """[N, 3]: offset, bytes and CRC-32 of KEY.json; 0 bytes when there is none."""
    first_image: NDArray[np.int64]
    """[N + 1]: sample i has images first_image[i] to first_image[i + 1]."""
    images: NDArray[np.int64]
    """[M, 5]: offset, bytes, CRC-32, width, height (upright); width 0 when it cannot be read."""
    problems: dict[int, str]
    """Image row -> why its header cannot be read."""
    stamp: Stamp
    digest: str
    """SHA-256 over names, places and CRCs: equal digests mean equal contents."""

    def __len__(self) -> int:
        return len(self.keys)

    def image_rows(self, row: int) -> range:
        """Rows of `images` that belong to the sample."""
        return range(int(self.first_image[row]), int(self.first_image[row + 1]))

    def image_sizes(self, row: int) -> list[tuple[int, int]]:
        """(width, height) of the sample's images.

        Raises:
            ValueError: an image whose header cannot be read.
        """
        for image in self.image_rows(row):
            if image in self.problems:
                raise ValueError(self.problems[image])
        sizes = self.images[int(self.first_image[row]) : int(self.first_image[row + 1]), 3:]
        return [(width, height) for width, height in sizes.tolist()]


def load_index(shard: Shard) -> ShardIndex:
    """The shard's index from beside it, made anew when it is missing, damaged or out of date.

    Raises:
        FileNotFoundError: the shard is missing.
        ShardError: the tar is torn or holds members that are refused.
    """
    stamp = shard.stamp()
    cached = read_beside(shard, INDEX_SUFFIX)
    if cached is not None:
        index = _from_arrays(cached)
        if index is not None and index.stamp == stamp:
            return index
    index = _build(shard, stamp)
    write_beside(shard, INDEX_SUFFIX, _to_arrays(index))
    return index


def index_state(shard: Shard) -> Literal["fresh", "missing", "stale"]:
    """Whether `load_index` would find an index that belongs to the shard as it is now.

    Raises:
        FileNotFoundError: the shard is missing.
    """
    stamp = shard.stamp()
    cached = read_beside(shard, INDEX_SUFFIX)
    if cached is None:
        return "missing"
    index = _from_arrays(cached)
    return "fresh" if index is not None and index.stamp == stamp else "stale"


def _build(shard: Shard, stamp: Stamp) -> ShardIndex:
    keys: list[str] = []
    records: list[tuple[int, int, int]] = []
    images: list[tuple[int, int, int, int, int]] = []
    first_image, problems = [0], dict[int, str]()
    for sample in scan_tar(shard):
        keys.append(sample.key)
        records.append(sample.record)
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
        keys=np.array(keys),
        records=np.array(records, dtype=np.int64).reshape(-1, _RECORD_FIELDS),
        first_image=np.array(first_image, dtype=np.int64),
        images=np.array(images, dtype=np.int64).reshape(-1, _IMAGE_FIELDS),
        problems=problems,
        stamp=stamp,
        digest=_digest(keys, records, images),
    )


def _digest(
    keys: list[str], records: Sequence[tuple[int, ...]], images: Sequence[tuple[int, ...]]
) -> str:
    digest = hashlib.sha256("\0".join(keys).encode())
    digest.update(np.array(records, dtype="<i8").tobytes())
    digest.update(np.array(images, dtype="<i8").tobytes())
    return digest.hexdigest()


def _to_arrays(index: ShardIndex) -> dict[str, NDArray[np.generic]]:
    return {
        "version": np.array(INDEX_VERSION),
        "keys": index.keys,
        "records": index.records,
        "first_image": index.first_image,
        "images": index.images,
        "problem_rows": np.array(list(index.problems), dtype=np.int64),
        "problem_texts": np.array(list(index.problems.values()), dtype=np.str_),
        "stamp": np.array([str(index.stamp.size), index.stamp.version]),
        "digest": np.array(index.digest),
    }


def _from_arrays(arrays: dict[str, NDArray[np.generic]]) -> ShardIndex | None:
    """The index, or None when another version of this code wrote it."""
    if "version" not in arrays or arrays["version"].tolist() != INDEX_VERSION:
        return None
    texts = arrays["problem_texts"].tolist()
    size, version = arrays["stamp"].tolist()
    return ShardIndex(
        keys=arrays["keys"].astype(np.str_),
        records=arrays["records"].astype(np.int64),
        first_image=arrays["first_image"].astype(np.int64),
        images=arrays["images"].astype(np.int64),
        problems=dict(zip(arrays["problem_rows"].tolist(), texts, strict=True)),
        stamp=Stamp(int(size), version),
        digest=str(arrays["digest"]),
    )


def read_beside(shard: Shard, suffix: str) -> dict[str, NDArray[np.generic]] | None:
    """Arrays of a cache file beside a local shard; None when missing or damaged. No pickles."""
    if not isinstance(shard, LocalShard):
        return None
    path = Path(shard.sibling(suffix))
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        _log.warning("cache=%s cannot be read (%s); it is made anew", path, error)
        return None


def write_beside(shard: Shard, suffix: str, arrays: dict[str, NDArray[np.generic]]) -> None:
    """Stores a cache file beside a local shard, whole or not at all.

    Where nothing can be written (a read-only directory, a remote store) it stays in memory, which
    one warning per directory says.
    """
    directory = os.path.dirname(shard.path)
    path = Path(shard.sibling(suffix))
    try:
        if not isinstance(shard, LocalShard):
            raise PermissionError("not a local directory")
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, **arrays)
        # Several ranks may write the same cache at once; each rename is atomic and all are equal.
        partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
        partial.write_bytes(buffer.getvalue())
        partial.replace(path)
    except OSError as error:
        if directory not in _warned_directories:
            _warned_directories.add(directory)
            _log.warning(
                "cannot write beside the shards in %s (%s); indexes stay in memory",
                directory,
                error,
            )
