"""The smoke data and uninterrupted runs on it, made once for all tests that compare with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.train.layouts import layout
from tests.train.smoke import make_smoke_data
from tests.workers import WorkerPool


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes tokenizer, shards and blend, which must not be changed."""
    root = tmp_path_factory.mktemp("smoke")
    make_smoke_data(root)
    return root


@pytest.fixture(scope="session")
def whole_run(
    workers: WorkerPool, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Returns `whole_run(layout, *overrides)`, the directory of an uninterrupted run. Do not change it."""
    from tests.train import runs

    done: dict[tuple[str, ...], Path] = {}

    def run(name: str, *overrides: str) -> Path:
        if (name, *overrides) not in done:
            run_dir = tmp_path_factory.mktemp("whole") / "run"
            world, parallel = layout(name)
            codes = workers.run(world, runs.run, data, run_dir, *parallel, *overrides)
            assert codes == [0] * world
            done[name, *overrides] = run_dir
        return done[name, *overrides]

    return run
