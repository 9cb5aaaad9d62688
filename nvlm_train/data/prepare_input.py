"""`nvlm data prepare`: an input to shards, in parallel, and again from where it was killed.

Shard n holds the entries from n * samples_per_shard on, whoever writes it: the same input makes the
same bytes with any number of workers. Shards wait in `NAME.partial/` until all are complete; then
they get their names, the manifest follows, and the directory goes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from nvlm_train.data.inputs.entries import InputSpec
from nvlm_train.data.inputs.formats import LISTED, open_entries
from nvlm_train.data.manifest import (
    BadEntry,
    Manifest,
    ShardEntry,
    read_manifest,
    sha256_of,
    write_json,
)
from nvlm_train.data.shard_task import (
    ShardResult,
    ShardTask,
    end_with_parent,
    run_task,
    stored_result,
)
from nvlm_train.data.shards import expand_pattern
from nvlm_train.errors import ShardError

PREPARE_VERSION = 1
"""Raised whenever the same input would become other bytes."""

_SHOWN = 5
_AHEAD = 4
"""Tasks waiting for each worker."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """Where shards go, and how they are cut."""

    directory: str
    name: str
    samples_per_shard: int = 1000
    max_bad: int = 0
    """Bad entries to leave out; one more is an error."""


@dataclass(frozen=True)
class PrepareProgress:
    """How far a preparation is."""

    num_entries: int
    num_done: int
    """Entries, bad ones included."""
    num_shards: int
    shards_done: int
    shards_kept: int
    """Of an earlier run that was interrupted."""
    num_bytes: int
    num_bad: int


def prepare_input(
    spec: InputSpec,
    target: Target,
    num_workers: int = 1,
    report: Callable[[PrepareProgress], None] = lambda _: None,
) -> Manifest:
    """Writes the shards and their manifest; finished shards of an interrupted run are kept.

    Raises:
        ShardError: an input that cannot be read, more bad entries than `max_bad`, or a directory
            that holds something else under this name.
    """
    staging = Path(target.directory) / f"{target.name}.partial"
    digest = _digest(spec, target)
    stored = read_manifest(target.directory, target.name)
    if stored is not None:
        _check_stored(stored, target, digest)
        _log.info("%s is complete already; nothing to do", target.name)
        shutil.rmtree(staging, ignore_errors=True)
        return stored
    _check_names(target, staging)
    staging.mkdir(parents=True, exist_ok=True)
    with _locked(staging):
        _check_job(staging, digest)
        for torn in staging.glob("writing-*"):
            torn.unlink()
        num_entries = len(open_entries(spec, staging / "input"))
        cut = target.samples_per_shard
        num_shards = -(-num_entries // cut)
        tasks = [
            ShardTask(spec, digest, str(staging), number, cut, target.max_bad)
            for number in range(num_shards)
        ]
        results = _results(tasks, num_entries, num_workers, report)
        manifest = _publish(staging, target, digest, results)
    shutil.rmtree(staging)
    return manifest


def _digest(spec: InputSpec, target: Target) -> str:
    """Of what the bytes depend on.

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


def _check_stored(stored: Manifest, target: Target, digest: str) -> None:
    where = f"{target.directory}/{target.name}.manifest.json"
    if stored.input != digest:
        raise ShardError(
            f"name={target.name}: {where} tells of other shards (another input, or the same one "
            "changed, or other options); choose another --name, or remove them"
        )
    for shard in stored.shards:
        path = Path(target.directory) / shard.file
        if not path.is_file() or path.stat().st_size != shard.num_bytes:
            raise ShardError(
                f"shard={path} is not the one that {where} tells of; "
                "remove the manifest and the shards to prepare them again"
            )


def _check_names(target: Target, staging: Path) -> None:
    pattern = f"{target.name}-[0-9][0-9][0-9][0-9][0-9][0-9].tar"
    present = sorted(Path(target.directory).glob(pattern))
    if present and not (staging / "publishing").exists():
        raise ShardError(
            f"name={target.name}: {present[0]} exists and no manifest tells of it; "
            "choose another --name, or remove it"
        )


def _check_job(staging: Path, digest: str) -> None:
    stored = staging / "job"
    if not stored.exists():
        write_json(stored, digest)
    elif json.loads(stored.read_text()) != digest:
        raise ShardError(
            f"{staging} belongs to an interrupted run with another input or other options (or the "
            "input changed since); run that again to finish it, or remove the directory"
        )


@contextmanager
def _locked(staging: Path) -> Iterator[None]:
    """The lock goes with the process, however it ends."""
    with (staging / "lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ShardError(
                f"{staging} is being written by another process; wait for it, or stop it"
            ) from None
        yield


def _results(
    tasks: Sequence[ShardTask],
    num_entries: int,
    num_workers: int,
    report: Callable[[PrepareProgress], None],
) -> list[ShardResult]:
    """All results in order, stored ones first where they are.

    Raises:
        ShardError: too many bad entries; which ones it names does not depend on the workers.
    """
    staging, max_bad = Path(tasks[0].staging), tasks[0].max_bad
    stored = {task.number: stored_result(staging, task.number) for task in tasks}
    pending = [task for task in tasks if stored[task.number] is None]
    kept = len(tasks) - len(pending)
    if kept:
        _log.info("%d of %d shards are there from the run before", kept, len(tasks))
    fresh = _run(pending, min(num_workers, len(pending)))
    progress = PrepareProgress(num_entries, 0, len(tasks), 0, kept, 0, 0)
    results: list[ShardResult] = []
    for task in tasks:
        result = stored[task.number] or next(fresh)
        results.append(result)
        progress = replace(
            progress,
            num_done=progress.num_done + result.num_entries,
            shards_done=progress.shards_done + 1,
            num_bytes=progress.num_bytes + (result.shard.num_bytes if result.shard else 0),
            num_bad=progress.num_bad + len(result.bad),
        )
        if progress.num_bad > max_bad:
            fresh.close()
            raise _too_many(results, staging, max_bad)
        report(progress)
    return results


def _run(tasks: Sequence[ShardTask], num_workers: int) -> Generator[ShardResult, None, None]:
    """Results in order of the tasks; a bounded number of tasks is under way."""
    if num_workers <= 1:
        yield from map(run_task, tasks)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([run_task.__module__, "webdataset"])
    waiting = iter(tasks)
    pool = ProcessPoolExecutor(num_workers, context, end_with_parent)
    try:
        futures: deque[Future[ShardResult]] = deque()
        for task in waiting:
            futures.append(pool.submit(run_task, task))
            if len(futures) >= num_workers * _AHEAD:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
    except BrokenProcessPool as error:
        raise ShardError(
            f"a worker was killed ({error}), perhaps for want of memory; run the same command "
            "again, with fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _too_many(results: Sequence[ShardResult], staging: Path, max_bad: int) -> ShardError:
    """The error; shards with bad entries are forgotten, so that a repaired input is read again."""
    bad = [each for result in results for each in result.bad]
    for result in results:
        if result.bad:
            (staging / f"{result.number:06d}.json").unlink(missing_ok=True)
    return _unusable(max_bad, bad)


def _unusable(max_bad: int, bad: Sequence[BadEntry]) -> ShardError:
    shown = [f"  - {each.place}: {each.reason}" for each in bad[:_SHOWN]]
    more = [f"  - and at least {len(bad) - _SHOWN} more"] if len(bad) > _SHOWN else []
    return ShardError(
        "\n".join(
            [
                f"max_bad={max_bad}: {len(bad)} or more entries cannot be used; repair them and "
                "run the same command again, or leave a few out with a larger --max-bad",
                *shown,
                *more,
            ]
        )
    )


def _publish(
    staging: Path, target: Target, digest: str, results: Sequence[ShardResult]
) -> Manifest:
    """Gives the shards their names, without gaps, and writes the manifest."""
    bad = tuple(each for result in results for each in result.bad)
    if not any(result.shard for result in results):
        raise _unusable(target.max_bad, bad)
    (staging / "publishing").touch()
    shards: list[ShardEntry] = []
    for result in results:
        if result.shard is None:
            continue
        shard = replace(result.shard, file=f"{target.name}-{len(shards):06d}.tar")
        waiting = staging / f"{result.number:06d}.tar"
        if waiting.exists():  # else an earlier run got this far
            os.replace(waiting, Path(target.directory) / shard.file)
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
