"""All shards through one process or several, their hashes through tables on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

from nvlm_train.config.schema import Recipe
from nvlm_train.data.checking.duplicates import DuplicateTables
from nvlm_train.data.checking.evaluation import (
    EvaluationPrints,
    Leaks,
    LeakTables,
    find_leaks,
    read_evaluation,
)
from nvlm_train.data.checking.findings import Findings
from nvlm_train.data.checking.shard import ShardChecker, ShardJob, ShardPrints
from nvlm_train.data.dataset import build_encoder
from nvlm_train.data.processes import processes

_OPEN_INDEXES = 32


@dataclass(frozen=True)
class CheckSettings:
    """Everything that a check needs besides the shards."""

    recipe: Recipe | None
    """The recipe whose stage is checked; None where shards are given by name."""
    stage: str
    max_image_pixels: int
    image_distance: int
    """Bits of 64 in which the hashes of near-duplicate images may differ."""
    against: tuple[str, ...]
    """Evaluation shards and JSON Lines files."""
    workers: int


@dataclass(frozen=True)
class _ShardReport:
    findings: Findings
    prints: ShardPrints
    leaks: Leaks


class _Worker:
    """The state that one process keeps between shards."""

    def __init__(self, settings: CheckSettings, evaluation: EvaluationPrints) -> None:
        import torch

        torch.set_num_threads(1)  # processes share the cores already
        recipe = settings.recipe
        encoder = None if recipe is None else build_encoder(recipe.stages[settings.stage], recipe)
        self._checker = ShardChecker(encoder, settings.max_image_pixels)
        self._evaluation = evaluation
        self._distance = settings.image_distance

    def check(self, job: ShardJob) -> _ShardReport:
        findings, prints = self._checker.check(job)
        leaks = find_leaks(prints, self._evaluation, self._distance)
        prints.texts.clear()  # only evaluation material needs them
        return _ShardReport(findings, prints, leaks)


_workers: list[_Worker] = []
"""This process's own, made once by `_start`."""


def _start(settings: CheckSettings, evaluation: EvaluationPrints) -> None:
    _workers[:] = [_Worker(settings, evaluation)]


def _check(job: ShardJob) -> _ShardReport:
    return _workers[0].check(job)


def run_check(
    jobs: Sequence[ShardJob], settings: CheckSettings, advance: Callable[[], None]
) -> Findings:
    """Checks all shards; `advance` is called after each.

    Memory holds the hashes of a few shards, of the evaluation sets, and of a 64th of all samples;
    the rest waits in temporary files, about 250 bytes an image.

    Raises:
        ConfigError: the recipe's tokenizer.
        ShardError, SampleError: evaluation material that cannot be read, or a process was killed.
    """
    evaluation = read_evaluation(settings.against, settings.max_image_pixels)
    findings = Findings()
    with tempfile.TemporaryDirectory(prefix="nvlm-check-") as directory:
        duplicates = DuplicateTables(Path(directory), settings.image_distance)
        leaked = LeakTables(Path(directory), evaluation.labels)
        with _reports(jobs, settings, evaluation) as reports:
            for job, report in zip(jobs, reports, strict=True):
                findings.merge(report.findings)
                duplicates.add(report.prints, job.number)
                leaked.add(report.leaks, job.number)
                advance()
        describe = partial(_describe, jobs)
        duplicates.report(findings, describe)
        leaked.report(findings, describe)
    _keys_of.cache_clear()
    return findings


@contextmanager
def _reports(
    jobs: Sequence[ShardJob], settings: CheckSettings, evaluation: EvaluationPrints
) -> Iterator[Iterator[_ShardReport]]:
    """Yields the reports in the order of the jobs, so that the same data gives the same examples."""
    worker = _Worker(settings, evaluation)  # what is wrong with the recipe is raised here
    if settings.workers == 1:
        yield map(worker.check, jobs)
        return
    with processes(settings.workers, _start, settings, evaluation) as pool:
        yield pool.map(_check, jobs)


def _describe(jobs: Sequence[ShardJob], place: int) -> tuple[str, str]:
    job, row = jobs[place >> 32], place & 0xFFFFFFFF
    return job.name, _keys_of(job)[row]


@lru_cache(maxsize=_OPEN_INDEXES)
def _keys_of(job: ShardJob) -> tuple[str, ...]:
    return tuple(job.open().index.keys.tolist())
