"""The cross path: against a dense reference, by the paper's mask, and with its gates shut."""

from __future__ import annotations

import pytest

from nvlm_train.config.schema import ParallelConfig
from tests.model import cross_runs
from tests.parity import cross_recipes
from tests.workers import WorkerPool


@pytest.mark.parametrize("name", cross_recipes.MODELS)
def test_dense_reference_agrees(workers: WorkerPool, name: str) -> None:
    (found, expected), gradients = workers.run(1, cross_runs.real_and_dense, name)[0]
    assert found == pytest.approx(expected, rel=1e-5)
    for key, (own, dense) in gradients.items():
        scale = dense.abs().max()
        assert scale > 0, key
        assert (own - dense).abs().max() < 1e-5 * scale, key


@pytest.mark.parametrize("name", cross_recipes.MODELS)
def test_a_tile_is_noticed_by_exactly_those_who_may_see_it(workers: WorkerPool, name: str) -> None:
    assert workers.run(1, cross_runs.who_notices, name, 20)[0] == []


@pytest.mark.parametrize("name", ["x", "h"])
@pytest.mark.parametrize(
    "parallel", [ParallelConfig(), ParallelConfig(tensor=2, pipeline=2)], ids=["TP1", "TP2 PP2"]
)
def test_shut_gates_change_nothing(
    workers: WorkerPool, name: str, parallel: ParallelConfig
) -> None:
    """X equals the text model bit for bit, H equals D on thumbnails."""
    world = parallel.tensor * parallel.pipeline
    answers = workers.run(world, cross_runs.gates_at_zero, name, parallel)
    assert [answer for answer in answers if answer is not None] == [True] * parallel.tensor
