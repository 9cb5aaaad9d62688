"""A process in which megatron-core is still as it was installed."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest


@pytest.fixture(scope="package")
def fresh() -> Iterator[ProcessPoolExecutor]:
    """Starts a new process, in which nothing of nvlm_train has been installed."""
    with _process() as executor:
        yield executor


@pytest.fixture
def new() -> Iterator[ProcessPoolExecutor]:
    """Starts another process, which has not imported megatron-core either."""
    with _process() as executor:
        yield executor


def _process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
