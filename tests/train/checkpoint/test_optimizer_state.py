"""Adam's moments through a checkpoint when there are several gradient buckets (checkpoint/shares.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvlm_train.config.schema import ParallelConfig
from tests.train.checkpoint import adam_moments
from tests.workers import WorkerPool

LAYOUTS = {"DP2": (2, ParallelConfig()), "PP2 DP2": (4, ParallelConfig(pipeline=2))}


@pytest.fixture(scope="module")
def expected(workers: WorkerPool) -> adam_moments.Moments:
    return workers.run(1, adam_moments.trained_moments)[0]


def worst_error(found: adam_moments.Moments, expected: adam_moments.Moments) -> float:
    """Returns the largest difference of a state relative to the largest value of that state."""
    assert found.keys() == expected.keys()
    return max(
        ((found[name][kind] - value).abs().max() / value.abs().max()).item()
        for name, states in expected.items()
        for kind, value in states.items()
    )


def through_a_checkpoint(
    workers: WorkerPool, layout: str, directory: Path, is_broken: bool = False
) -> adam_moments.Moments:
    """Returns states that were saved in a layout with several buckets and loaded in a single process."""
    world, parallel = LAYOUTS[layout]
    padding = workers.run(world, adam_moments.train_and_save, parallel, directory, is_broken)[0]
    # What megatron-core's own format does not count.
    assert len(padding) > 1 and any(padding), "there is no padding between buckets"
    return workers.run(1, adam_moments.load, directory)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_moments_survive_resharding(
    workers: WorkerPool, expected: adam_moments.Moments, tmp_path: Path, layout: str
) -> None:
    found = through_a_checkpoint(workers, layout, tmp_path / "saved")
    assert worst_error(found, expected) < 1e-5


def test_moments_of_other_numbers_are_caught(
    workers: WorkerPool, expected: adam_moments.Moments, tmp_path: Path
) -> None:
    """Negative control: the check above sees a rank that saves its numbers as others."""
    found = through_a_checkpoint(workers, "DP2", tmp_path / "saved", is_broken=True)
    assert worst_error(found, expected) > 0.1
