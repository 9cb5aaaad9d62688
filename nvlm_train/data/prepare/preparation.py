"""`nvlm data prepare`: an input to shards, in parallel, and again from where it was killed.

Shard n holds the entries from n * samples_per_shard on, whoever writes it: the same input makes the
same bytes with any number of workers. Shards wait in `NAME.partial/` until all are complete; then
they get their names, the manifest follows, and the directory goes.
"""

from __future__ import annotations

import logging
import multiprocessing
import shutil
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from nvlm_train.data.prepare.inputs.entries import InputSpec
from nvlm_train.data.prepare.inputs.formats import open_entries
from nvlm_train.data.prepare.shard_task import (
    ShardResult,
    ShardTask,
    end_with_parent,
    run_task,
    stored_result,
)
from nvlm_train.data.prepare.staging import (
    Target,
    check_job,
    check_names,
    check_stored,
    input_digest,
    locked,
    publish,
)
from nvlm_train.data.processes import killed_workers_explained
from nvlm_train.data.shards.manifest import Manifest, read_manifest
from nvlm_train.errors import ShardError

_SHOWN = 5
_AHEAD = 4
"""Tasks waiting for each worker."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrepareProgress:
    """The progress of a preparation."""

    num_entries: int
    num_done: int
    """Entries, bad ones included."""
    num_shards: int
    shards_done: int
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
    digest = input_digest(spec, target)
    stored = read_manifest(target.directory, target.name)
    if stored is not None:
        check_stored(stored, target, digest)
        _log.info("%s is complete already; nothing to do", target.name)
        shutil.rmtree(staging, ignore_errors=True)
        return stored
    check_names(target, staging)
    staging.mkdir(parents=True, exist_ok=True)
    with locked(staging):
        check_job(staging, digest)
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
        manifest = publish(staging, target, digest, results)
    shutil.rmtree(staging)
    return manifest


def _results(
    tasks: Sequence[ShardTask],
    num_entries: int,
    num_workers: int,
    report: Callable[[PrepareProgress], None],
) -> list[ShardResult]:
    """Returns all results in order; tasks whose result is stored are not run again.

    Raises:
        ShardError: too many bad entries, or no good one; which ones it names does not depend on the workers.
    """
    staging, max_bad = Path(tasks[0].staging), tasks[0].max_bad
    stored = {task.number: stored_result(staging, task.number) for task in tasks}
    pending = [task for task in tasks if stored[task.number] is None]
    kept = len(tasks) - len(pending)
    if kept:
        _log.info("%d of %d shards are there from the run before", kept, len(tasks))
    fresh = _run(pending, min(num_workers, len(pending)))
    progress = PrepareProgress(num_entries, 0, len(tasks), 0, 0, 0)
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
            raise _too_many(tasks, results)
        report(progress)
    if not any(result.shard for result in results):
        raise _unusable(max_bad, results)
    return results


def _run(tasks: Sequence[ShardTask], num_workers: int) -> Generator[ShardResult, None, None]:
    """Yields the results in the order of the tasks; a bounded number of tasks is under way."""
    if num_workers <= 1:
        yield from map(run_task, tasks)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([run_task.__module__, "webdataset"])
    waiting = iter(tasks)
    pool = ProcessPoolExecutor(num_workers, context, end_with_parent)
    try:
        with killed_workers_explained():
            futures: deque[Future[ShardResult]] = deque()
            for task in waiting:
                futures.append(pool.submit(run_task, task))
                if len(futures) >= num_workers * _AHEAD:
                    yield futures.popleft().result()
            while futures:
                yield futures.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _too_many(tasks: Sequence[ShardTask], results: Sequence[ShardResult]) -> ShardError:
    """Returns the error and forgets shards with bad entries, so that a repaired input is read again."""
    staging = Path(tasks[0].staging)
    for task in tasks:
        stored = stored_result(staging, task.number)
        if stored is not None and stored.bad:
            (staging / f"{task.number:06d}.json").unlink()
    return _unusable(tasks[0].max_bad, results)


def _unusable(max_bad: int, results: Sequence[ShardResult]) -> ShardError:
    bad = [each for result in results for each in result.bad]
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
