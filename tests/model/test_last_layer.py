"""The last layer: right for the positions that are wanted, and idle for the others."""

from __future__ import annotations

import pytest
import torch

from nvlm_train.config.schema import ParallelConfig
from tests.model import last_rows
from tests.parity import cross_recipes
from tests.workers import WorkerPool


@pytest.mark.parametrize(
    ("lengths", "shares"),
    [
        ([12], [0.25]),
        ([12], [1.0]),
        ([3, 9, 1, 20], [1.0, 0.0, 1.0, 0.1]),
        ([1500, 700], [0.4, 0.45]),
    ],
    ids=["few", "all", "several samples", "more than one mask"],
)
def test_wanted_rows_are_those_of_all(
    workers: WorkerPool, lengths: list[int], shares: list[float]
) -> None:
    alone, cut = workers.run(1, last_rows.of_wanted_and_of_all, lengths, shares, 0)[0]
    for own, expected in zip(alone, cut, strict=True):
        torch.testing.assert_close(own, expected)


@pytest.mark.parametrize("name", ["d beside x", "x", "h", "flamingo"])
@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(),
        ParallelConfig(tensor=2, sequence_parallel=True),
        ParallelConfig(pipeline=2),
    ],
    ids=["single", "TP2 SP", "PP2"],
)
def test_only_the_models_last_layer_stops_early(
    workers: WorkerPool, name: str, parallel: ParallelConfig
) -> None:
    """Three positions, filled up to four where two ranks share the rows."""
    shared = 2 if parallel.sequence_parallel else 1
    rows = cross_recipes.SEQUENCE_LENGTH // shared
    answers = workers.run(
        parallel.tensor * parallel.pipeline, last_rows.rows_of_layers, name, parallel
    )
    found = {number: counts for answer in answers for number, counts in answer.items()}
    last = max(found)
    assert last == cross_recipes.MODELS["x"].language.num_layers
    assert found.pop(last) == ({1: 3, 2: 2}[shared], rows)
    assert set(found.values()) == {(rows, rows)}
