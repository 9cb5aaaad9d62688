"""How often the host reads the device in a step: a few times, and no more often with more packs."""

from __future__ import annotations

import pytest

from nvlm_train.config.schema import ParallelConfig
from tests.train import host_reads
from tests.workers import WorkerPool

LAYOUTS = {
    "single": (1, ParallelConfig()),
    "TP2 PP2": (4, ParallelConfig(tensor=2, pipeline=2)),
    "TP2 SP PP2 full recompute": (
        4,
        ParallelConfig(tensor=2, pipeline=2, sequence_parallel=True, recompute="full"),
    ),
    "PP2 DP2 overlapped": (4, ParallelConfig(pipeline=2, overlap_grad_reduce=True)),
}
AT_MOST = 4
"""The gradient norm, and what is reported."""
FAST = {("h", "single")}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(name, layout, marks=[] if (name, layout) in FAST else pytest.mark.slow)
        for name in ("d beside x", "x", "h", "flamingo")
        for layout in LAYOUTS
    ],
)
def test_reads_do_not_grow_with_packs(workers: WorkerPool, name: str, layout: str) -> None:
    world, parallel = LAYOUTS[layout]
    few = workers.run(world, host_reads.of_a_step, name, parallel, 2, 1)
    many = workers.run(world, host_reads.of_a_step, name, parallel, 32, 2)
    assert few == many
    assert all(0 < sum(counts.values()) <= AT_MOST for counts in many), many
    assert not any("synchronize" in counts for counts in many)


def test_a_read_in_a_layer_is_counted(workers: WorkerPool) -> None:
    """Deliberate bug: attention reads the lengths of segments from the device, as it once did."""
    (few,) = workers.run(1, host_reads.of_a_step_with_bug, "h", 2)
    (many,) = workers.run(1, host_reads.of_a_step_with_bug, "h", 4)
    assert many["tolist"] > few["tolist"] > AT_MOST
