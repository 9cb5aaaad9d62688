"""What every input is made into: numbered entries, read by number."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nvlm_train.data.images import read_size
from nvlm_train.data.samples.records import read_messages
from nvlm_train.data.shards.fields import OWN_FIELDS, FieldMapping
from nvlm_train.data.shards.tar import IMAGE_SUFFIXES, Sample
from nvlm_train.errors import ShardError

Parts = tuple[Mapping[str, Any], list[tuple[str, bytes]]]
"""(record, [(file name or nothing, image bytes)])."""

_MAGIC = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG", "png"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tif"),
    (b"MM\0*", "tif"),
)
_RIFF, _WEBP = b"RIFF", b"WEBP"


@dataclass(frozen=True)
class InputSpec:
    """An input as the command line describes it."""

    format: str
    paths: tuple[str, ...]
    images: str = "."
    """Folder, zip or tar in which relative image names start."""
    fields: FieldMapping = OWN_FIELDS
    """Members (of tars, folders, zips), columns (of tables) or names (of JSON) that make a record."""
    image_name: str = ""
    """VQAv2: how an image id becomes a file name; nothing for COCO's way."""
    split: str = ""
    """The split of a `datasets.DatasetDict`."""


class Entries(Protocol):
    """Entries 0 to len - 1 of an input."""

    def __len__(self) -> int: ...

    def place(self, number: int) -> str:
        """Says where somebody finds the entry: file and line, row or key."""

    def read(self, number: int) -> Parts:
        """Reads the entry. Raises ValueError or OSError: this one cannot be used."""


class Lines:
    """Entries that are lines of files: the input's own, or a list written for the purpose.

    `places` is int64 [N, 3]: file, offset, line number from 1.
    """

    def __init__(
        self,
        files: tuple[str, ...],
        places: NDArray[np.int64],
        parse: Callable[[bytes], Parts],
        describe: Callable[[str, int, int], str],
    ) -> None:
        self._files, self._places = files, places
        self._parse, self._describe = parse, describe

    def __len__(self) -> int:
        return len(self._places)

    def place(self, number: int) -> str:
        file, _, line = self._places[number].tolist()
        return self._describe(self._files[file], number, line)

    def read(self, number: int) -> Parts:
        file, offset, _ = self._places[number].tolist()
        with Path(self._files[file]).open("rb") as stream:
            stream.seek(offset)
            return self._parse(stream.readline())


def find_lines(files: tuple[str, ...], spool: Path) -> NDArray[np.int64]:
    """Finds where the lines that are not blank begin: int64 [N, 3], kept as `spool/lines.npy`."""
    stored = spool / "lines.npy"
    if not stored.is_file():
        found: list[tuple[int, int, int]] = []
        for number, file in enumerate(files):
            offset = 0
            with open_input(file) as stream:
                for line, text in enumerate(stream, 1):
                    if text.strip():
                        found.append((number, offset, line))
                    offset += len(text)
        partial = spool / "lines.partial.npy"
        np.save(partial, np.array(found, dtype=np.int64).reshape(-1, 3), allow_pickle=False)
        partial.replace(stored)
    places: NDArray[np.int64] = np.load(stored, allow_pickle=False)
    return places


def write_list(items: Callable[[], Iterable[object]], spool: Path) -> str:
    """Writes items as JSON, one a line, to `spool/entries.jsonl`; a file that is there is kept."""
    stored = spool / "entries.jsonl"
    if not stored.is_file():
        partial = spool / "entries.jsonl.partial"
        with partial.open("w") as lines:
            for item in items():
                lines.write(json.dumps(item) + "\n")
        partial.replace(stored)
    return str(stored)


def open_input(path: str) -> Any:
    """Opens the file as a binary stream. Raises ShardError: it is not there."""
    try:
        return Path(path).open("rb")
    except OSError as error:
        raise ShardError(f"input={path} cannot be read: {error}; correct the path") from error


def load_json(path: str) -> Any:
    """Reads a whole JSON file. Raises ShardError: it is missing, or not JSON."""
    with open_input(path) as stream:
        try:
            return json.load(stream)
        except (ValueError, RecursionError) as error:
            raise ShardError(f"input={path} is not JSON: {error}; repair the file") from error


def parse_object(line: bytes) -> dict[str, Any]:
    """Returns the JSON object of a line. Raises ValueError: it is none."""
    try:
        item = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON ({error}); repair or remove it") from error
    if not isinstance(item, dict):
        raise ValueError(f"it is a {type(item).__name__}, not an object")
    return item


def as_sample(key: str, parts: Parts) -> Sample:
    """Returns the entry as it is written, checked as the loader will read it.

    Raises:
        ValueError: no chat can be made of the record, or an image cannot be opened.
    """
    record, images = parts
    members: list[tuple[str, bytes]] = []
    for number, (name, data) in enumerate(images):
        suffix = _suffix(name, data)
        try:
            read_size(data)
        except ValueError as error:
            raise ValueError(f"image={name or number}: {error}") from error
        members.append((suffix if len(images) == 1 else f"{number}.{suffix}", data))
    try:
        encoded = json.dumps(record, ensure_ascii=False).encode()
    except TypeError as error:
        raise ValueError(f"{error}; name the fields to keep with --field") from error
    except UnicodeEncodeError as error:
        raise ValueError(f"the record is not Unicode text ({error}); repair it") from error
    read_messages(encoded, key, len(images), "sft")
    return key, record, members


def _suffix(name: str, data: bytes) -> str:
    """Returns the suffix that the bytes ask for, else that of the file's name."""
    for magic, suffix in _MAGIC:
        if data.startswith(magic):
            return suffix
    if data[:4] == _RIFF and data[8:12] == _WEBP:
        return "webp"
    named = os.path.splitext(name)[1].lstrip(".").lower()
    return named if named in IMAGE_SUFFIXES else IMAGE_SUFFIXES[0]
