"""The host runs ahead of a GPU: it waits a few times at the end of a step, however many packs there are."""

from __future__ import annotations

import pytest

from tests.gpu import host_waits
from tests.gpu.paths import CPU, FAST, D, H, X
from tests.train.test_host_reads import AT_MOST
from tests.workers import WorkerPool


def check(few: host_waits.Waits, many: host_waits.Waits) -> None:
    assert few == many
    assert few.elsewhere == 0 and 0 < few.allowed <= AT_MOST


@pytest.mark.gpu
@pytest.mark.parametrize("path", FAST)
@pytest.mark.parametrize("name", [D, X, H])
def test_waits_for_a_gpu_do_not_grow_with_packs(gpu: WorkerPool, name: str, path: str) -> None:
    """Any other wait is an error of CUDA's check, whose traceback says where it is."""
    few, many = (gpu.run(1, host_waits.of_a_step, name, FAST[path], n)[0] for n in (2, 32))
    check(few, many)


@pytest.mark.gpu
@pytest.mark.parametrize("path", FAST)
def test_a_wait_for_a_gpu_is_caught(gpu: WorkerPool, path: str) -> None:
    """Negative control: bounds of a pack are read from the device."""
    (error,) = gpu.run(1, host_waits.error_with_bug, H, FAST[path])
    assert "synchronizing CUDA operation" in error


@pytest.mark.slow
def test_reads_do_not_grow_with_packs(workers: WorkerPool) -> None:
    few, many = (workers.run(1, host_waits.of_a_step, H, CPU, n)[0] for n in (2, 6))
    check(few, many)


def test_a_read_is_caught(workers: WorkerPool) -> None:
    (waits,) = workers.run(1, host_waits.of_a_step_with_bug, H, CPU, 2)
    assert waits.elsewhere == 2
