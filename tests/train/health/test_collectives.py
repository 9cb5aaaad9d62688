"""Which recorder is asked for a world's collectives."""

from __future__ import annotations

from types import SimpleNamespace

import torch.distributed as dist

from nvlm_train.train.health import collectives
from tests.workers import WorkerPool

BOTH = SimpleNamespace(
    _dump_nccl_trace_json=lambda: b'{"entries": ["nccl"]}',
    _dump_fr_trace_json=lambda: b'{"entries": ["gloo"]}',
)
"""torch's bindings in a build with NCCL, where each backend fills a recorder of its own."""


def test_each_backend_has_its_recorder() -> None:
    assert collectives.content(BOTH, "nccl") == {"entries": ["nccl"]}
    assert collectives.content(BOTH, "gloo") == {"entries": ["gloo"]}


def test_a_torch_without_a_recorder_gives_nothing() -> None:
    assert collectives.content(SimpleNamespace(), "nccl") == {}
    assert collectives.content(BOTH, "mpi") == {}


def test_this_worlds_recorder_is_found(workers: WorkerPool) -> None:
    """The recorder is the real one, of gloo."""
    assert workers.run(1, _recorded) == ["gloo"]


def _recorded() -> str:
    assert "entries" in collectives.recorded()
    return dist.get_backend()
