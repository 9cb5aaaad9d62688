"""Fixtures shared by the whole suite."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.workers import WorkerPool


@pytest.fixture(scope="session")
def workers() -> Iterator[WorkerPool]:
    """Starts four gloo processes for the whole session."""
    pool = WorkerPool(4)
    yield pool
    pool.close()
