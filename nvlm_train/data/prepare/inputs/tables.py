"""Rows of Parquet files and of `datasets` saved to disk."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from nvlm_train.data.prepare.inputs.chats import IMAGE_NAMES, with_id
from nvlm_train.data.prepare.inputs.entries import Entries, InputSpec, Parts
from nvlm_train.data.prepare.inputs.files import modified, open_files
from nvlm_train.errors import ShardError

_MISSING = "pip install 'nvlm-train[prepare]'"


class ParquetRows:
    """The rows of Parquet files, in the order of the files; a row group is read at a time."""

    def __init__(self, spec: InputSpec, files: Sequence[str]) -> None:
        self._spec, self._files = spec, tuple(files)
        metadata = [_parquet(file, modified(file)).metadata for file in files]
        self._first_row = [0, *accumulate(each.num_rows for each in metadata)]
        self._first_in_group = [
            [0, *accumulate(each.row_group(n).num_rows for n in range(each.num_row_groups))]
            for each in metadata
        ]

    def __len__(self) -> int:
        return int(self._first_row[-1])

    def place(self, number: int) -> str:
        file, row = self._locate(number)
        return f"{self._files[file]}: row {row}"

    def read(self, number: int) -> Parts:
        file, row = self._locate(number)
        starts = self._first_in_group[file]
        group = bisect_right(starts, row) - 1
        name = self._files[file]
        table = _row_group(name, modified(name), group)
        return row_parts(self._spec, table.slice(row - starts[group], 1).to_pylist()[0])

    def _locate(self, number: int) -> tuple[int, int]:
        file = bisect_right(self._first_row, number) - 1
        return file, number - self._first_row[file]


class DatasetRows:
    """The rows of a `datasets.Dataset`, mapped from disk; images are left as they were stored."""

    def __init__(self, spec: InputSpec, dataset: Any) -> None:
        self._spec = spec
        self._rows = dataset.with_format("arrow")

    def __len__(self) -> int:
        return len(self._rows)

    def place(self, number: int) -> str:
        return f"{self._spec.paths[0]}: row {number}"

    def read(self, number: int) -> Parts:
        return row_parts(self._spec, self._rows[number : number + 1].to_pylist()[0])


def open_parquet(spec: InputSpec, spool: Path) -> Entries:
    """Opens Parquet files, or folders of them. Raises ShardError: one is missing, or not Parquet."""
    del spool
    files = [file for path in spec.paths for file in _parquet_files(path)]
    return ParquetRows(spec, files)


def open_dataset(spec: InputSpec, spool: Path) -> Entries:
    """Opens what `datasets.save_to_disk` wrote. Raises ShardError: it is something else."""
    del spool
    try:
        import datasets
    except ImportError as error:
        raise ShardError(f"format=datasets needs the package datasets: {_MISSING}") from error
    path = spec.paths[0]
    try:
        found = datasets.load_from_disk(path)
    except (OSError, ValueError) as error:
        raise ShardError(f"input={path} was not written by save_to_disk: {error}") from error
    if isinstance(found, datasets.DatasetDict):
        if spec.split not in found:
            raise ShardError(f"split={spec.split!r}: {path} has {sorted(found)}; choose one")
        found = found[spec.split]
    elif spec.split:
        raise ShardError(f"split={spec.split!r}: {path} is one split; leave --split out")
    return DatasetRows(spec, found)


def row_parts(spec: InputSpec, row: Mapping[str, Any]) -> Parts:
    """Returns a row's record and images. Null columns are left out.

    Images are bytes, `{"bytes", "path"}` as `datasets.Image` stores them, file names, or lists of
    such.

    Raises:
        ValueError: an image column with something else, a field that the mapping misses.
    """
    row = {name: value for name, value in row.items() if value is not None}
    columns = spec.fields.images or tuple(
        name for name, value in row.items() if name in IMAGE_NAMES or _holds_images(value)
    )
    images: list[tuple[str, bytes]] = []
    for column in columns:
        value = row.get(column)
        for each in value if isinstance(value, list) else [value]:
            if each is not None:
                images.append(_image(spec, column, each))
    if spec.fields.sources:
        return with_id(spec.fields.select(row), row.get("id")), images
    return {name: value for name, value in row.items() if name not in columns}, images


def _holds_images(value: object) -> bool:
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, bytes) or (
        isinstance(first, dict) and first.keys() == {"bytes", "path"}
    )


def _image(spec: InputSpec, column: str, value: object) -> tuple[str, bytes]:
    if isinstance(value, dict):
        name, data = value.get("path") or "", value.get("bytes")
    else:
        name, data = (value, None) if isinstance(value, str) else ("", value)
    if data is None and isinstance(name, str) and name:
        data = open_files(spec.images).read(name)
    if not isinstance(data, bytes):
        raise ValueError(
            f"column {column} holds {type(value).__name__}, not an image; "
            "name the image column with --field image=NAME"
        )
    return str(name), data


def _parquet_files(path: str) -> list[str]:
    if not Path(path).is_dir():
        return [path]
    found = sorted(str(file) for file in Path(path).rglob("*.parquet"))
    if not found:
        raise ShardError(f"input={path} has no .parquet file in it; correct the path")
    return found


@lru_cache(maxsize=16)
def _parquet(file: str, version: int) -> Any:
    del version  # another one is opened again
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ShardError(f"format=parquet needs the package pyarrow: {_MISSING}") from error
    try:
        return pyarrow.parquet.ParquetFile(file, memory_map=True)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise ShardError(f"input={file} is no Parquet file that can be read: {error}") from error


@lru_cache(maxsize=1)
def _row_group(file: str, version: int, group: int) -> Any:
    return _parquet(file, version).read_row_group(group)
