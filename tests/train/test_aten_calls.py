"""A microbatch calls at most half of the operators on a CPU that it called before."""

from __future__ import annotations

import pytest

from tests.train import aten_calls
from tests.workers import WorkerPool

BEFORE = {"d": 1423, "x": 1934}
"""Counted in the same way at commit b4d27e3, with attention and RoPE segment by segment."""
AT_MOST = {name: calls // 2 for name, calls in BEFORE.items()}


@pytest.mark.parametrize("name", AT_MOST)
def test_a_microbatch_calls_few_operators(workers: WorkerPool, name: str) -> None:
    (found,) = workers.run(1, aten_calls.of_a_microbatch, name)
    assert found <= AT_MOST[name]
