"""Files that belong together by their names (`7.jpg`, `7.txt`, `7.json`): in tars, zips, folders."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

from nvlm_train.data.index.reader import ShardReader
from nvlm_train.data.index.shard_index import load_index
from nvlm_train.data.prepare.inputs.chats import with_id
from nvlm_train.data.prepare.inputs.entries import (
    Entries,
    InputSpec,
    Lines,
    Parts,
    find_lines,
    parse_object,
    write_list,
)
from nvlm_train.data.prepare.inputs.files import modified, open_files
from nvlm_train.data.shards.fields import FieldMapping
from nvlm_train.data.shards.scan import split_name
from nvlm_train.data.shards.store import DIRECT
from nvlm_train.data.shards.tar import expand_pattern
from nvlm_train.errors import ShardError


class TarSamples:
    """The samples of WebDataset tars, one tar after the other."""

    def __init__(self, spec: InputSpec, paths: Sequence[str]) -> None:
        self._spec, self._paths = spec, tuple(paths)
        counts = [len(self._reader(path).index) for path in self._paths]
        self._first = [0, *accumulate(counts)]

    def __len__(self) -> int:
        return self._first[-1]

    def place(self, number: int) -> str:
        reader, row = self._locate(number)
        return f"{reader.name}: key {reader.key(row)}"

    def read(self, number: int) -> Parts:
        reader, row = self._locate(number)
        record = parse_object(reader.record(row))
        images = [("", reader.image(row, n)) for n in range(len(reader.index.image_rows(row)))]
        return with_id(record, reader.key(row)), images

    def _locate(self, number: int) -> tuple[ShardReader, int]:
        tar = bisect_right(self._first, number) - 1
        return self._reader(self._paths[tar]), number - self._first[tar]

    def _reader(self, path: str) -> ShardReader:
        return _reader(path, modified(path), self._spec.fields)


@lru_cache(maxsize=16)
def _reader(path: str, version: int, fields: FieldMapping) -> ShardReader:
    del version  # another one is opened again
    shard = DIRECT.open(path)
    try:
        return ShardReader(path, shard, load_index(shard, fields=fields), fields)
    except OSError as error:
        raise ShardError(f"input={path} cannot be read: {error}; correct the path") from error


def open_members(spec: InputSpec, spool: Path) -> Entries:
    """Opens tars (also `x-{000..009}.tar`), or one zip or folder of files that share a key.

    Raises:
        ShardError: missing, torn, or nothing in it.
    """
    path = spec.paths[0]
    if not path.endswith(".zip") and not Path(path).is_dir():
        return TarSamples(spec, [name for each in spec.paths for name in expand_pattern(each)])
    files = open_files(path)

    def grouped() -> list[object]:
        groups: dict[str, dict[str, str]] = {}
        for name in files.names():
            key, suffix = split_name(name)
            if key and suffix:
                groups.setdefault(key, {})[suffix] = name
        return [{"key": key, "members": members} for key, members in groups.items()]

    def parse(line: bytes) -> Parts:
        item = json.loads(line)
        members: dict[str, str] = item["members"]
        missing = [suffix for suffix in spec.fields.members if suffix not in members]
        if missing:
            raise ValueError(f"{item['key']}.{missing[0]} is missing beside {sorted(members)}")
        record = spec.fields.record([files.read(members[s]) for s in spec.fields.members])
        numbers = {suffix: spec.fields.image_number(suffix) for suffix in members}
        ranked = sorted((n, suffix) for suffix, n in numbers.items() if n is not None)
        images = [(members[suffix], files.read(members[suffix])) for _, suffix in ranked]
        return with_id(parse_object(record), item["key"]), images

    listed = write_list(grouped, spool)
    return Lines(
        (listed,), find_lines((listed,), spool), parse, lambda _file, n, _line: f"{path}: entry {n}"
    )
