"""The cross path: against a dense reference, by the paper's mask, and with its gates shut."""

from __future__ import annotations

import pytest

from nvlm_train.config.schema import ParallelConfig
from tests.model import cross_memory, cross_runs
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


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("x", "h") else pytest.param(name, marks=pytest.mark.slow)
        for name in cross_recipes.MODELS
    ],
)
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


@pytest.mark.slow
def test_an_image_costs_a_layer_its_keys_and_values(workers: WorkerPool) -> None:
    """At 34B shapes, seven tiles instead of one; a score matrix would be 14 times keys and values."""
    found = workers.run(1, cross_memory.bytes_by_tiles, (1, 7))[0]
    most, kept = (found[7][what] - found[1][what] for what in (0, 1))
    own = cross_memory.keys_and_values(6)
    assert kept == pytest.approx(own, rel=0.01)
    assert most <= own + 2 * cross_memory.context(6), "the normed context comes and goes"
