"""LLaVA's JSON, JSON Lines of any record form, and plain text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from nvlm_train.data.prepare.inputs.entries import (
    Entries,
    InputSpec,
    Lines,
    Parts,
    find_lines,
    load_json,
    parse_object,
    write_list,
)
from nvlm_train.data.prepare.inputs.files import Files, open_files
from nvlm_train.errors import ShardError

IMAGE_NAMES = ("image", "images")


def open_llava(spec: InputSpec, spool: Path) -> Entries:
    """Opens a JSON list of `{"id", "image": name or names, "conversations"}`, and its images.

    Raises:
        ShardError: the file is no JSON list.
    """

    def items() -> list[object]:
        content = load_json(spec.paths[0])
        if not isinstance(content, list):
            raise ShardError(
                f"input={spec.paths[0]} must be a JSON list; "
                "for one object a line use the format jsonl"
            )
        return content

    listed = write_list(items, spool)
    parse = partial(listed_parts, spec, open_files(spec.images))
    return Lines((listed,), find_lines((listed,), spool), parse, partial(_entry, spec.paths[0]))


def open_jsonl(spec: InputSpec, spool: Path) -> Entries:
    """Opens files of one record a line, as `records` reads it, with `image` or `images` beside it."""
    parse = partial(listed_parts, spec, open_files(spec.images))
    return Lines(spec.paths, find_lines(spec.paths, spool), parse, line_of)


def open_text(spec: InputSpec, spool: Path) -> Entries:
    """Opens plain text to continue: a document per line of a file, or per `.txt` of a folder."""
    if not Path(spec.paths[0]).is_dir():
        return Lines(spec.paths, find_lines(spec.paths, spool), _document, line_of)
    folder = open_files(spec.paths[0])
    listed = write_list(lambda: [n for n in folder.names() if n.endswith(".txt")], spool)

    def parse(line: bytes) -> Parts:
        return _document(folder.read(json.loads(line)))

    return Lines((listed,), find_lines((listed,), spool), parse, partial(_entry, spec.paths[0]))


def listed_parts(spec: InputSpec, files: Files, line: bytes) -> Parts:
    """Returns a listed record, and the images that it names.

    Raises:
        ValueError: not an object, an image that is missing, a field that the mapping misses.
    """
    item = parse_object(line)
    names = spec.fields.images or IMAGE_NAMES
    images = [(name, files.read(name)) for column in names for name in image_names(item, column)]
    if not spec.fields.sources:
        return {key: value for key, value in item.items() if key not in names}, images
    return with_id(spec.fields.select(item), item.get("id")), images


def image_names(item: Mapping[str, Any], column: str) -> list[str]:
    """Returns the file names in one field. Raises ValueError: it holds something else."""
    named = item.get(column)
    names = [named] if isinstance(named, str) else (named or [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{column}={named!r} must be a file name, or a list of them")
    return [name for name in names if name]


def with_id(record: dict[str, Any], identity: object) -> dict[str, Any]:
    """Returns the record with its identity in the source as `id`, where there is one."""
    return record if identity is None or "id" in record else {"id": identity, **record}


def line_of(file: str, number: int, line: int) -> str:
    """Says where an entry of the input's own lines stands."""
    return f"{file}: line {line} (entry {number})"


def _entry(path: str, _file: str, number: int, _line: int) -> str:
    return f"{path}: entry {number}"


def _document(line: bytes) -> Parts:
    text = line.decode().strip()
    if not text:
        raise ValueError("the document is empty; remove it")
    return {"conversations": [{"from": "gpt", "value": text}]}, []
