"""D, X and H: the same samples in packs as long as a sample and in longer ones, the same gradients."""

from __future__ import annotations

import pytest
from torch import Tensor

from nvlm_train.config.schema import ParallelConfig
from tests.model.cross_runs import together
from tests.parity import pack_lengths
from tests.parity.cross_recipes import ALL as MODELS
from tests.parity.test_layouts import TOLERANCE, worst_error
from tests.workers import WorkerPool

LONG = 1000
"""No eighth of it is a multiple of 64: shorter packs are rounded up."""
LAYOUTS = {
    "single": (1, ParallelConfig(), 1),
    "TP2 SP PP2": (4, ParallelConfig(tensor=2, pipeline=2, sequence_parallel=True), 1),
    "PP2 DP2 in two rounds": (4, ParallelConfig(pipeline=2), 2),
}
SLOW = ("PP2 DP2 in two rounds",)


@pytest.fixture(scope="module", params=["d beside x", "x", "h"])
def reference(request: pytest.FixtureRequest, workers: WorkerPool) -> tuple:
    """Returns the model's name, and loss and gradients with packs of `sequence_length`."""
    run = workers.run(1, pack_lengths.gradients_of_step, request.param, ParallelConfig(), None)
    return request.param, *run[0]


def error(name: str, found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Gates are one number each, so those of X and H are compared together."""
    if MODELS[name].cross_attention is not None:
        found, expected = together(found), together(expected)
    return worst_error([found], [expected])


@pytest.mark.parametrize(
    "layout",
    [pytest.param(each, marks=pytest.mark.slow if each in SLOW else []) for each in LAYOUTS],
)
def test_longer_packs_have_the_same_gradients(
    workers: WorkerPool, reference: tuple, layout: str
) -> None:
    name, expected_loss, expected = reference
    world, parallel, rounds = LAYOUTS[layout]
    assert pack_lengths.num_packs(name, LONG) * 2 <= pack_lengths.num_packs(name, None)
    loss, found = workers.run(world, pack_lengths.gradients_of_step, name, parallel, LONG, rounds)[
        0
    ]
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert error(name, found, expected) < TOLERANCE


def test_samples_of_a_long_pack_do_not_see_each_other(
    workers: WorkerPool, reference: tuple
) -> None:
    """A control: one segment for the whole pack is a bug that the comparison must catch."""
    name, _, expected = reference
    _, found = workers.run(1, pack_lengths.gradients_of_one_segment, name, LONG)[0]
    assert error(name, found, expected) > 100 * TOLERANCE
