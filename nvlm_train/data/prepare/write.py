"""Writing samples that a program makes: `NAME-000000.tar`, ..., and a manifest.

Files that exist already are prepared by `prepare_input`, in parallel.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from nvlm_train.data.shards.manifest import Manifest, describe_shard
from nvlm_train.data.shards.tar import SAMPLES_PER_SHARD, Sample, write_shards


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
    shards = tuple(describe_shard(shard.path, shard.num_samples) for shard in written)
    manifest = Manifest(
        name=name,
        num_samples=sum(shard.num_samples for shard in shards),
        num_images=num_images,
        num_bytes=sum(shard.num_bytes for shard in shards),
        shards=shards,
    )
    manifest.write(directory)
    return manifest
