"""Gradients by canonical name: the kernels of a GPU against fp32 on a CPU, same weights and packs."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.gpu import gradient_runs
from tests.gpu.gradient_runs import Found
from tests.gpu.paths import CPU_BF16, GPU, LOSS_TOLERANCE, TOLERANCE, D, H, X
from tests.parity.test_bf16 import worst_distance
from tests.workers import WorkerPool

OnACpu = Callable[[str], Found]
LEAK = "samples of a pack attend to each other"


def check(found: Found, expected: Found, precision: str) -> None:
    """Compares losses and gradients of both steps."""
    assert found.losses == pytest.approx(expected.losses, rel=LOSS_TOLERANCE[precision])
    assert worst_distance(found.gradients, expected.gradients) < TOLERANCE[precision]


@pytest.mark.gpu
@pytest.mark.parametrize("path", GPU)
@pytest.mark.parametrize("name", [D, X, H])
def test_a_gpu_finds_what_a_cpu_does(
    gpu: WorkerPool, on_a_cpu: OnACpu, name: str, path: str
) -> None:
    (found,) = gpu.run(1, gradient_runs.run, name, GPU[path])
    check(found, on_a_cpu(name), GPU[path].precision)
    # What is for fp32 and odd heads alone would say nothing of the kernel that trains.
    assert "use_unfused_attention" not in found.attention
    assert len(found.attention) == (GPU[path].library == "transformer_engine")


@pytest.mark.gpu
@pytest.mark.parametrize("path", GPU)
def test_a_leak_is_caught_on_a_gpu(gpu: WorkerPool, on_a_cpu: OnACpu, path: str) -> None:
    """Negative control: samples of a pack that see each other are past the tolerance of bf16."""
    (found,) = gpu.run(1, gradient_runs.with_bug, LEAK, H, GPU[path])
    assert worst_distance(found.gradients, on_a_cpu(H).gradients) > 2 * TOLERANCE["bf16"]


def test_a_cpu_s_bf16_is_near_its_fp32(workers: WorkerPool, on_a_cpu: OnACpu) -> None:
    """The same runs on a CPU, whose bf16 rounds as a GPU's does."""
    (found,) = workers.run(1, gradient_runs.run, H, CPU_BF16)
    check(found, on_a_cpu(H), "bf16")


def test_a_leak_is_caught(workers: WorkerPool, on_a_cpu: OnACpu) -> None:
    (found,) = workers.run(1, gradient_runs.with_bug, LEAK, H, CPU_BF16)
    assert worst_distance(found.gradients, on_a_cpu(H).gradients) > 2 * TOLERANCE["bf16"]
