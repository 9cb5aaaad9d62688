"""Reads and writes manifest.json: size and SHA-256 of every file of a checkpoint.

The manifest is written last, so a checkpoint that has one is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nvlm_train.errors import CheckpointError, FormatError

FILE_NAME = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class FileDigest:
    """Holds the size and the hash that a file must have."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Lists the files of a checkpoint, and its place among the checkpoints of its run."""

    sequence: int
    """Number that grows with every save of a run. File times would not survive a copy of the directory."""
    files: Mapping[str, FileDigest]


def digest_file(path: Path) -> FileDigest:
    """Reads a file and returns its size and hash.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileDigest(file.tell(), digest)


def write_manifest(manifest: Manifest, directory: Path) -> None:
    """Writes manifest.json with a digest of itself.

    Raises:
        OSError: the disk is full or read-only.
    """
    content = {"format": FORMAT, **asdict(manifest)}
    with (directory / FILE_NAME).open("w") as file:
        file.write(json.dumps({**content, "sha256": _own_digest(content)}, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_manifest(directory: Path) -> Manifest:
    """Reads manifest.json.

    Raises:
        CheckpointError: it is missing, incomplete or changed; the message is only the reason.
        FormatError: it is intact, but has a format that this version does not read.
    """
    content = _whole_content(directory)
    if content["format"] != FORMAT:
        raise FormatError(
            f"{directory / FILE_NAME}: format={content['format']}, this version reads {FORMAT}; go on "
            "with the nvlm-train that wrote it, or use another run_dir"
        )
    files = {name: FileDigest(**each) for name, each in content["files"].items()}
    return Manifest(content["sequence"], files)


def _whole_content(directory: Path) -> dict[str, Any]:
    """Reads a manifest of any format. Its format is believed only when the file is intact."""
    try:
        content: dict[str, Any] = json.loads((directory / FILE_NAME).read_bytes())
        stored = content.pop("sha256")
    except FileNotFoundError:
        raise CheckpointError(f"{FILE_NAME} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{FILE_NAME} cannot be read") from error
    if stored != _own_digest(content):
        raise CheckpointError(f"{FILE_NAME} was changed after it was written")
    return content


def damage(directory: Path, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """Returns what is wrong with some of a checkpoint's files.

    A wrong size is found without reading the file.

    Raises:
        OSError: a file is there and cannot be read.
    """
    found = []
    for name in names:
        path, expected = directory / name, manifest.files[name]
        if not path.is_file():
            found.append(f"{name} is missing")
        elif (size := path.stat().st_size) != expected.bytes:
            found.append(f"{name} has {size} bytes of {expected.bytes}")
        elif digest_file(path).sha256 != expected.sha256:
            found.append(f"{name} has other bytes than were written (SHA-256 differs)")
    return found


def _own_digest(content: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
