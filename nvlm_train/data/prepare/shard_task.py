"""One shard of a preparation, written by one process: a pure function of the input and its number."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import chain
from multiprocessing import connection, parent_process
from pathlib import Path

from nvlm_train.data.prepare.inputs.entries import Entries, InputSpec, as_sample
from nvlm_train.data.prepare.inputs.formats import open_entries
from nvlm_train.data.shards.manifest import BadEntry, ShardEntry, describe_shard, write_json
from nvlm_train.data.shards.tar import Sample, write_shards
from nvlm_train.errors import ShardError

KEY = "{:09d}"
"""Keys come from the position: ids in the wild repeat and contain dots."""

_MAX_SHOWN = 20
"""Bad entries that are looked for once there are too many."""


@dataclass(frozen=True)
class ShardTask:
    """A shard to write: entries [number * samples_per_shard, ...) become `staging/NUMBER.tar`."""

    spec: InputSpec
    digest: str
    """The digest of the input as it is now."""
    staging: str
    number: int
    samples_per_shard: int
    max_bad: int


@dataclass(frozen=True)
class ShardResult:
    """The outcome of a task; stored as `staging/NUMBER.json`, which says that the tar is complete."""

    number: int
    num_entries: int
    num_images: int
    shard: ShardEntry | None
    """The tar; there is none when every entry is bad."""
    bad: tuple[BadEntry, ...]


def run_task(task: ShardTask) -> ShardResult:
    """Writes the shard, then the result beside it. With more than `max_bad` bad entries, neither.

    Raises:
        ShardError: the input as a whole cannot be read.
    """
    staging = Path(task.staging)
    entries = _entries(task.spec, task.digest, task.staging)
    start = task.number * task.samples_per_shard
    numbers = range(start, min(start + task.samples_per_shard, len(entries)))
    bad: list[BadEntry] = []
    num_images, shard = 0, None

    def counted(sample: Sample) -> Sample:
        nonlocal num_images
        num_images += len(sample[2])
        return sample

    samples = _samples(task, entries, numbers, bad)
    first = next(samples, None)
    if first is not None:
        # A name of this process: one that was killed may have left the other.
        pattern = str(staging / f"writing-{os.getpid()}-%06d.tar")
        whole = map(counted, chain([first], samples))
        written = write_shards(whole, pattern, 1 << 62, first_shard=task.number)
        with Path(written[0].path).open("rb") as stream:
            os.fsync(stream.fileno())  # before the result that says it is complete
        shard = describe_shard(written[0].path, written[0].num_samples)
        result = ShardResult(task.number, len(numbers), num_images, shard, tuple(bad))
        if len(bad) > task.max_bad:
            Path(written[0].path).unlink()
            return result
        os.replace(written[0].path, staging / f"{task.number:06d}.tar")
    result = ShardResult(task.number, len(numbers), num_images, shard, tuple(bad))
    if len(bad) <= task.max_bad:
        write_json(staging / f"{task.number:06d}.json", asdict(result))
    return result


def stored_result(staging: Path, number: int) -> ShardResult | None:
    """Reads the result of a task that was finished; None when it was not."""
    try:
        fields = json.loads((staging / f"{number:06d}.json").read_text())
    except FileNotFoundError:
        return None
    shard = fields.pop("shard")
    bad = tuple(BadEntry(**each) for each in fields.pop("bad"))
    return ShardResult(shard=ShardEntry(**shard) if shard else None, bad=bad, **fields)


def end_with_parent() -> None:
    """Starts a watch, in a new worker, that ends it when the process that started it is gone.

    After `kill -9` a worker would otherwise wait for its next task forever.
    """
    parent = parent_process()
    assert parent is not None, "runs in workers only"

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _samples(
    task: ShardTask, entries: Entries, numbers: range, bad: list[BadEntry]
) -> Iterator[Sample]:
    for number in numbers:
        key = KEY.format(number)
        try:
            sample = as_sample(key, entries.read(number))
        except (ValueError, OSError) as error:
            bad.append(BadEntry(entries.place(number), key, str(error)))
            if len(bad) > max(task.max_bad, _MAX_SHOWN):
                return
            continue
        yield sample


@lru_cache(maxsize=1)
def _entries(spec: InputSpec, digest: str, staging: str) -> Entries:
    del digest  # a changed input is opened again
    try:
        return open_entries(spec, Path(staging) / "input")
    except OSError as error:
        raise ShardError(f"input={' '.join(spec.paths)} cannot be read: {error}") from error
