"""What gradients of other layouts and precisions are compared with."""

from __future__ import annotations

import pytest

from nvlm_train.config.schema import ParallelConfig
from tests.parity.recipes import STEPS
from tests.workers import WorkerPool


@pytest.fixture(scope="session")
def reference(workers: WorkerPool) -> tuple:
    """Returns losses and gradients of D in fp32, from one process in one round."""
    from tests.parity import gradients

    return workers.run(1, gradients.gradients_of_step, ParallelConfig(), STEPS)[0]
