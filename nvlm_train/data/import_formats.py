"""Foreign layouts as samples for `prepare_shards`: LLaVA's JSON, and JSON Lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nvlm_train.data.shards import IMAGE_SUFFIXES, Sample
from nvlm_train.errors import SampleError

_IMAGE_FIELDS = ("image", "images")


def read_llava(json_path: str, image_root: str) -> Iterator[Sample]:
    """A JSON list of `{"id", "image": path or list of paths, "conversations"}` and a folder.

    Raises:
        SampleError: an image that is missing or has no known suffix.
        ValueError: the file is not a JSON list of objects.
    """
    items = json.loads(Path(json_path).read_text())
    if not isinstance(items, list):
        raise ValueError(
            f"{json_path}: must be a JSON list; use read_jsonl for one object per line"
        )
    for number, item in enumerate(items):
        yield _sample(json_path, number, item, image_root)


def read_jsonl(jsonl_path: str, image_root: str) -> Iterator[Sample]:
    """One record per line, any form that `records` accepts, with optional `image` or `images`.

    Raises:
        SampleError, ValueError: as `read_llava`.
    """
    with Path(jsonl_path).open() as lines:
        for number, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                item = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{jsonl_path}: line {number + 1} is not JSON: {error}") from error
            yield _sample(jsonl_path, number, item, image_root)


def _sample(path: str, number: int, item: object, image_root: str) -> Sample:
    if not isinstance(item, dict):
        raise ValueError(f"{path}: entry {number} is a {type(item).__name__}, not an object")
    # Keys come from the position: ids in the wild repeat and contain dots.
    key = f"{number:09d}"
    record = {name: value for name, value in item.items() if name not in _IMAGE_FIELDS}
    return key, record, _images(path, key, item, image_root)


def _images(path: str, key: str, item: dict[str, Any], image_root: str) -> list[tuple[str, bytes]]:
    named = item.get("image", item.get("images")) or []
    paths = [named] if isinstance(named, str) else list(named)
    images: list[tuple[str, bytes]] = []
    for number, name in enumerate(paths):
        file = Path(image_root) / str(name)
        suffix = file.suffix.lstrip(".").lower()
        if suffix not in IMAGE_SUFFIXES:
            raise SampleError(
                path, key, f"image={name}: the suffix must be one of {', '.join(IMAGE_SUFFIXES)}"
            )
        if not file.is_file():
            raise SampleError(path, key, f"image={file} does not exist; correct the image folder")
        images.append((suffix if len(paths) == 1 else f"{number}.{suffix}", file.read_bytes()))
    return images
