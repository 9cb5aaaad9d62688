"""What a CPU finds in fp32, computed once for all tests that compare with it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.gpu.gradient_runs import Found
from tests.workers import WorkerPool


@pytest.fixture(scope="session")
def on_a_cpu(workers: WorkerPool) -> Callable[[str], Found]:
    """Returns losses and gradients of a model by its name."""
    from tests.gpu import gradient_runs
    from tests.gpu.paths import CPU

    done: dict[str, Found] = {}

    def found(name: str) -> Found:
        if name not in done:
            (done[name],) = workers.run(1, gradient_runs.run, name, CPU)
        return done[name]

    return found
