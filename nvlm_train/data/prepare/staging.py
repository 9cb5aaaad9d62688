"""The directory in which a preparation waits: whose it is, who writes there, and its shards' names."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from nvlm_train.data.prepare.inputs.entries import InputSpec
from nvlm_train.data.prepare.inputs.formats import LISTED
from nvlm_train.data.prepare.shard_task import ShardResult
from nvlm_train.data.shards.manifest import Manifest, ShardEntry, sha256_of, write_json
from nvlm_train.data.shards.tar import expand_pattern
from nvlm_train.errors import ShardError

PREPARE_VERSION = 1
"""Raised whenever the same input would become other bytes."""


@dataclass(frozen=True)
class Target:
    """The shards to write: where they go, and how they are cut."""

    directory: str
    name: str
    samples_per_shard: int = 1000
    max_bad: int = 0
    """Bad entries to leave out; one more is an error."""


def input_digest(spec: InputSpec, target: Target) -> str:
    """Returns a digest of everything that the bytes depend on.

    Lists count by their contents, archives and tables by size and time; single images are too many
    to look at.
    """
    files: list[list[object]] = []
    for pattern in spec.paths:
        for path in [pattern] if os.path.exists(pattern) else expand_pattern(pattern):
            if os.path.exists(path):
                status = os.stat(path)
                listed = spec.format in LISTED and os.path.isfile(path)
                files.append([path, sha256_of(path) if listed else _stamp(status)])
    cut = [target.name, target.samples_per_shard]
    content = [PREPARE_VERSION, asdict(spec), files, cut]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _stamp(status: os.stat_result) -> list[int]:
    return [status.st_size, status.st_mtime_ns]


def check_stored(stored: Manifest, target: Target, digest: str) -> None:
    """Checks the shards of a complete run. Raises ShardError: they are of another, or some are gone."""
    where = f"{target.directory}/{target.name}.manifest.json"
    if stored.input != digest:
        raise ShardError(
            f"name={target.name}: {where} lists other shards (another input, or the same one "
            "changed, or other options); choose another --name, or remove them"
        )
    for shard in stored.shards:
        path = Path(target.directory) / shard.file
        if not path.is_file() or path.stat().st_size != shard.num_bytes:
            raise ShardError(
                f"shard={path} is not the one that {where} lists; "
                "remove the manifest and the shards to prepare them again"
            )


def check_names(target: Target, staging: Path) -> None:
    """Raises ShardError: there are shards of this name that no manifest lists."""
    pattern = f"{target.name}-[0-9][0-9][0-9][0-9][0-9][0-9].tar"
    present = sorted(Path(target.directory).glob(pattern))
    if present and not (staging / "publishing").exists():
        raise ShardError(
            f"name={target.name}: {present[0]} exists and no manifest lists it; "
            "choose another --name, or remove it"
        )


def check_job(staging: Path, digest: str) -> None:
    """Notes what is prepared here. Raises ShardError: something else was prepared here before."""
    stored = staging / "job"
    if not stored.exists():
        write_json(stored, digest)
    elif json.loads(stored.read_text()) != digest:
        raise ShardError(
            f"{staging} belongs to an interrupted run with another input or other options (or the "
            "input changed since); run that again to finish it, or remove the directory"
        )


@contextmanager
def locked(staging: Path) -> Iterator[None]:
    """Holds a lock that ends with the process. Raises ShardError: another process has it."""
    with (staging / "lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ShardError(
                f"{staging} is being written by another process; wait for it, or stop it"
            ) from None
        yield


def publish(staging: Path, target: Target, digest: str, results: Sequence[ShardResult]) -> Manifest:
    """Gives the shards their names, without gaps, and writes the manifest."""
    bad = tuple(each for result in results for each in result.bad)
    (staging / "publishing").touch()
    shards: list[ShardEntry] = []
    for result in results:
        if result.shard is None:
            continue
        shard = replace(result.shard, file=f"{target.name}-{len(shards):06d}.tar")
        waiting = staging / f"{result.number:06d}.tar"
        final = Path(target.directory) / shard.file
        if waiting.exists():  # else an earlier run got this far
            os.replace(waiting, final)
        elif not final.exists():
            raise ShardError(f"shard={waiting} is gone; remove {staging} and start again")
        shards.append(shard)
    manifest = Manifest(
        name=target.name,
        num_samples=sum(shard.num_samples for shard in shards),
        num_images=sum(result.num_images for result in results),
        num_bytes=sum(shard.num_bytes for shard in shards),
        shards=tuple(shards),
        num_bad=len(bad),
        bad=bad,
        input=digest,
    )
    manifest.write(target.directory)
    return manifest
