"""A real run writes what docs/reference/metrics.md says, and nothing else.

What only some steps write (the slowest rank, steps that are not finite) is compared in
tests/train/health/test_health_runs.py, whose runs have such steps.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.train.layouts import NO_DROPOUT
from tests.train.metric_names import SOURCES, documented, records


def test_a_run_writes_the_fields_of_the_page(whole_run: Callable[..., Path]) -> None:
    every_step, by_source = documented("StepRecord"), documented("SourceRecord")
    lines = records(whole_run("single", *NO_DROPOUT))
    for line in lines:
        assert every_step <= line.keys() <= every_step | by_source
    assert set().union(*lines) == every_step | by_source
    for line in lines:
        trained = [line.get(f"trained_tokens/{source}", 0) for source in SOURCES]
        assert sum(trained) == line["trained_tokens"] > 0


@pytest.mark.parametrize("name", ["DP2", pytest.param("TP2 PP2", marks=pytest.mark.slow)])
def test_counts_are_the_same_in_another_layout(whole_run: Callable[..., Path], name: str) -> None:
    """Each sum is over the whole step, whoever has what of it: nothing is missed, nothing counted twice."""
    one, other = records(whole_run("single", *NO_DROPOUT)), records(whole_run(name))
    for mine, others in zip(one, other, strict=True):
        counts = {field: value for field, value in mine.items() if isinstance(value, int)}
        assert {"samples", "tokens", "trained_tokens", "tiles", "data_position"} < counts.keys()
        assert {field: others[field] for field in counts} == counts
