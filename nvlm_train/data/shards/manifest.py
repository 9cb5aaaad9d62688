"""The manifest: what is in a set of shards, and what was left out of it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nvlm_train.errors import ShardError

MANIFEST_FORMAT = 1
"""The format of the file; one that states none is of the first."""
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class ShardEntry:
    """One shard of a manifest."""

    file: str
    num_samples: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class BadEntry:
    """An entry of the input that was left out."""

    place: str
    """File and line, row or key."""
    key: str
    """The key that its sample would have."""
    reason: str


@dataclass(frozen=True)
class Manifest:
    """The list of what was written; stored as `NAME.manifest.json` beside the shards."""

    name: str
    num_samples: int
    num_images: int
    num_bytes: int
    shards: tuple[ShardEntry, ...]
    num_bad: int = 0
    bad: tuple[BadEntry, ...] = ()
    input: str = ""
    """Digest of the input's files and of everything that shapes the shards; may be unknown."""
    format: int = MANIFEST_FORMAT

    @property
    def pattern(self) -> str:
        """The pattern that a data recipe writes to read all shards."""
        last = len(self.shards) - 1
        return f"{self.name}-{{000000..{last:06d}}}.tar" if last else f"{self.name}-000000.tar"

    def write(self, directory: str) -> None:
        """Stores the manifest, whole or not at all."""
        write_json(Path(directory) / f"{self.name}.manifest.json", asdict(self))


def read_manifest(directory: str, name: str) -> Manifest | None:
    """Reads the stored manifest; None when there is none. Raises ShardError: it is something else."""
    path = Path(directory) / f"{name}.manifest.json"
    try:
        fields: dict[str, Any] = json.loads(path.read_text())
        check_format(fields, str(path))
        shards = tuple(ShardEntry(**shard) for shard in fields.pop("shards"))
        bad = tuple(BadEntry(**each) for each in fields.pop("bad", []))
        return Manifest(shards=shards, bad=bad, **fields)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardError(f"manifest={path} cannot be read: {error!r}; remove it") from error


def check_format(fields: Mapping[str, Any], path: str) -> None:
    """Raises ShardError: a manifest of another format, whose fields may mean something else."""
    stated = fields.get("format", MANIFEST_FORMAT)
    if stated != MANIFEST_FORMAT:
        raise ShardError(
            f"manifest={path}: format={stated}, this version reads {MANIFEST_FORMAT}; use the nvlm-train "
            "that wrote it, or name the shards themselves in the data recipe"
        )


def describe_shard(path: str, num_samples: int) -> ShardEntry:
    """Returns the entry of a finished tar."""
    return ShardEntry(Path(path).name, num_samples, os.path.getsize(path), sha256_of(path))


def sha256_of(path: str) -> str:
    """Returns the SHA-256 of a file's contents, in hex."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def write_json(path: Path, content: object) -> None:
    """Writes a JSON file that is there whole, also after a power cut, or not at all."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as stream:
        stream.write(json.dumps(content, indent=2) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)
