"""Writing shards: `NAME-000000.tar`, ..., and a manifest that says what is in them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from nvlm_train.data.shards import SAMPLES_PER_SHARD, Sample, write_shards

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class ShardEntry:
    """One shard of a manifest."""

    file: str
    num_samples: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What was written; stored as `NAME.manifest.json` beside the shards."""

    name: str
    num_samples: int
    num_images: int
    num_bytes: int
    shards: tuple[ShardEntry, ...]

    @property
    def pattern(self) -> str:
        """What a data recipe writes to read all shards."""
        last = len(self.shards) - 1
        return f"{self.name}-{{000000..{last:06d}}}.tar" if last else f"{self.name}-000000.tar"


def prepare_shards(
    samples: Iterable[Sample], directory: str, name: str, samples_per_shard: int = SAMPLES_PER_SHARD
) -> Manifest:
    """Writes samples as shards and their manifest; the same samples make the same bytes.

    Nothing appears under its final name before everything is written, the manifest last.

    Raises:
        ShardError: no samples, or keys that WebDataset cannot hold.
    """
    num_images = 0

    def counted() -> Iterator[Sample]:
        nonlocal num_images
        for sample in samples:
            num_images += len(sample[2])
            yield sample

    written = write_shards(counted(), str(Path(directory) / f"{name}-%06d.tar"), samples_per_shard)
    shards = tuple(
        ShardEntry(
            Path(shard.path).name,
            shard.num_samples,
            os.path.getsize(shard.path),
            _sha256(shard.path),
        )
        for shard in written
    )
    manifest = Manifest(
        name=name,
        num_samples=sum(shard.num_samples for shard in shards),
        num_images=num_images,
        num_bytes=sum(shard.num_bytes for shard in shards),
        shards=shards,
    )
    partial = Path(directory) / f"{name}.manifest.json.partial"
    partial.write_text(json.dumps(asdict(manifest), indent=2) + "\n")
    partial.replace(partial.with_suffix(""))
    return manifest


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
