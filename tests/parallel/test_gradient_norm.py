"""The norm of all gradients: megatron-core's number, with nothing read on the host."""

from __future__ import annotations

import pytest
import torch

from tests.parallel import norms
from tests.workers import WorkerPool


def test_it_is_megatron_cores(workers: WorkerPool) -> None:
    """Bit for bit, on gradients of the sizes and scales of a model; an empty one counts nothing."""
    for own, other in workers.run(1, norms.both)[0]:
        assert own.shape == other.shape == (1,)
        assert torch.equal(own, other)


def test_it_is_installed_and_reads_nothing(workers: WorkerPool) -> None:
    """megatron-core's stand-in reads every norm inside of `torch.tensor`, where it cannot be counted, and
    then the norm of these, where it can."""
    assert workers.run(1, norms.installed)[0] == "nvlm_train.parallel.gradient_norm"
    assert workers.run(1, norms.scalars_read)[0] == (0, 1)


@pytest.mark.gpu
def test_it_does_not_wait_for_a_gpu() -> None:
    tensors = [torch.randn(size, device="cuda") for size in (3, 1000, 70_000)]
    expected = torch.cat(tensors).double().norm().item()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        norm = norms.own(tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert norm.item() == pytest.approx(expected, rel=1e-6)
