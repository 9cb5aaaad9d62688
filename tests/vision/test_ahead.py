"""Features of rounds that are made one round ahead: which, when, and that they are the same bits."""

from __future__ import annotations

import pytest
import torch

from nvlm_train.config.schema import ParallelConfig
from tests.vision import ahead_runs
from tests.workers import WorkerPool


@pytest.mark.parametrize(
    ("world", "parallel"),
    [(1, ParallelConfig()), (4, ParallelConfig(tensor=2, pipeline=2))],
    ids=["single", "TP2 PP2"],
)
def test_each_round_is_encoded_while_the_one_before_it_trains(
    workers: WorkerPool, world: int, parallel: ParallelConfig
) -> None:
    """Two steps of two rounds: the first round when it is needed, each other one round ahead, also past
    the end of a step, and none twice."""
    expected = ["encode 0", "encode 1", "train 0", "encode 2", "train 1"]
    expected += ["encode 3", "train 2", "train 3"]
    for found in workers.run(world, ahead_runs.order_of_encoding, parallel):
        assert found.events == expected
        assert found.ahead == found.at_once, "losses and gradients, bit for bit"


def test_what_was_not_expected_is_encoded_when_it_is_asked_for(workers: WorkerPool) -> None:
    """As examples of a run are answered between two steps: the round that is under way is still used."""
    (found,) = workers.run(1, ahead_runs.with_another_round_between)
    assert found.events == ["encode 0", "encode 1", "encode other"]
    assert found.is_same_other and found.is_same_next


@pytest.mark.gpu
def test_a_gpu_encodes_beside_the_training() -> None:
    """Steps on the training stream, with tiles encoded on the side stream, are those of one stream."""
    found = ahead_runs.steps_on_a_gpu()
    assert found.ahead == found.at_once
    assert found.seconds_beside > 0
    assert torch.cuda.current_stream() == torch.cuda.default_stream(), (
        "the training stream was left"
    )
