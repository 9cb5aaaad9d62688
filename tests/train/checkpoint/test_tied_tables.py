"""Tied tables through a checkpoint: one entry, both copies equal, in other layouts; padding never trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nvlm_train.config.schema import ParallelConfig
from tests.train.checkpoint import tied_tables
from tests.train.checkpoint.tied_tables import TOKENS, Copy
from tests.workers import WorkerPool

TP2_PP2 = ParallelConfig(tensor=2, pipeline=2)


@pytest.fixture(scope="module")
def expected(workers: WorkerPool) -> Copy:
    (copy,) = workers.run(1, tied_tables.trained_copies, ParallelConfig())[0]
    return copy


def assert_close(found: Copy, expected: Copy) -> None:
    for name, value in expected.states.items():
        scale = value.abs().max().item()
        assert scale > 0
        torch.testing.assert_close(found.states[name], value, rtol=0, atol=1e-5 * scale)


@pytest.fixture(scope="module")
def eight() -> Iterator[WorkerPool]:
    pool = WorkerPool(8)
    yield pool
    pool.close()


def test_both_copies_survive_resharding(
    workers: WorkerPool, expected: Copy, tmp_path: Path
) -> None:
    survive(
        workers, workers.run(4, *saving(ParallelConfig(pipeline=2), tmp_path)), expected, tmp_path
    )


@pytest.mark.slow
def test_both_copies_survive_resharding_from_eight_ranks(
    workers: WorkerPool, eight: WorkerPool, expected: Copy, tmp_path: Path
) -> None:
    """TP2 x PP2 x DP2."""
    survive(workers, eight.run(8, *saving(TP2_PP2, tmp_path)), expected, tmp_path)


def saving(parallel: ParallelConfig, tmp_path: Path) -> tuple[Callable[..., Any], Any, Path]:
    return tied_tables.train_and_save, parallel, tmp_path / "saved"


def survive(workers: WorkerPool, padding: list[list[int]], expected: Copy, tmp_path: Path) -> None:
    """What was saved with a distributed optimizer of several buckets, loaded in two other layouts."""
    assert len(padding[0]) > 1
    first, last = workers.run(4, tied_tables.load, TP2_PP2, tmp_path / "saved")[0]
    for name in expected.states:
        assert torch.equal(first.states[name], last.states[name]), name
    assert_close(first, expected)
    (alone,) = workers.run(1, tied_tables.load, ParallelConfig(), tmp_path / "saved")[0]
    for name in expected.states:
        assert torch.equal(first.states[name], alone.states[name]), name


def test_padding_never_trains(workers: WorkerPool, expected: Copy) -> None:
    """No gradient has ever touched its rows; what weight decay takes of random rows is not training."""
    before = workers.run(1, tied_tables.start)[0]
    table = expected.states["param"]
    for name in ("exp_avg", "exp_avg_sq"):
        assert not expected.states[name][TOKENS:].any()
        assert expected.states[name][:TOKENS].any(dim=1).all()
    padding, start = table[TOKENS:], before[TOKENS:]
    assert torch.allclose(padding / start, (padding / start).flatten()[0], rtol=1e-5)
    assert not torch.allclose(table[:TOKENS], before[:TOKENS], rtol=1e-3)
