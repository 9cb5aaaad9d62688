"""A process in which megatron-core is still as it was installed."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest


@pytest.fixture(scope="package")
def fresh() -> Iterator[ProcessPoolExecutor]:
    """One new process; nothing of nvlm_train has been installed there."""
    with _process() as executor:
        yield executor


@pytest.fixture
def new() -> Iterator[ProcessPoolExecutor]:
    """Another, which has not imported megatron-core either."""
    with _process() as executor:
        yield executor


def _process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
