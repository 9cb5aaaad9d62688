"""A real run writes what docs/reference/metrics.md says, and nothing else.

What only some steps write (the slowest rank, steps that are not finite) is compared in
tests/train/health/test_health_runs.py, whose runs have such steps.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nvlm_train.train import part_timer
from tests.train.layouts import NO_DROPOUT
from tests.train.metric_names import SOURCES, every_step, records, where_there_is_one


def test_a_run_writes_the_fields_of_the_page(whole_run: Callable[..., Path]) -> None:
    always, sometimes = every_step(), where_there_is_one()
    lines = records(whole_run("single", *NO_DROPOUT))
    for line in lines:
        assert always <= line.keys() <= always | sometimes
    assert set().union(*lines) == always | sometimes, "a CPU has no peak, so no MFU"
    for line in lines:
        trained = [line.get(f"trained_tokens/{source}", 0) for source in SOURCES]
        assert sum(trained) == line["trained_tokens"] > 0


def test_parts_add_up_to_the_step(whole_run: Callable[..., Path]) -> None:
    """No second is missed or counted twice, and each part of the step takes some."""
    for line in records(whole_run("single", *NO_DROPOUT)):
        parts = {part: line[f"seconds/{part}"] for part in part_timer.PARTS}
        assert sum(parts.values()) == pytest.approx(line["seconds"], rel=0.02)
        assert parts["encode"] > 0 or line["tiles"] == 0
        assert min(parts["layers"], parts["output"], parts["optimizer"], parts["waiting"]) > 0
        flops = sum(
            line[f"tflops_per_rank/{part}"] * parts[part]
            for part in part_timer.COMPUTED
            if f"tflops_per_rank/{part}" in line
        )
        assert flops == pytest.approx(line["tflops_per_rank"] * line["seconds"])


@pytest.mark.parametrize("name", ["DP2", pytest.param("TP2 PP2", marks=pytest.mark.slow)])
def test_counts_are_the_same_in_another_layout(whole_run: Callable[..., Path], name: str) -> None:
    """Each sum is over the whole step, whoever has what of it: nothing is missed, nothing counted twice."""
    one, other = records(whole_run("single", *NO_DROPOUT)), records(whole_run(name))
    for mine, others in zip(one, other, strict=True):
        counts = {field: value for field, value in mine.items() if isinstance(value, int)}
        assert {"samples", "tokens", "trained_tokens", "tiles", "data_position"} < counts.keys()
        assert {field: others[field] for field in counts} == counts


@pytest.mark.slow
def test_the_first_of_two_stages_has_no_output(whole_run: Callable[..., Path]) -> None:
    """Rank 0's layers are timed there too, and its waiting for the second stage is waiting."""
    for line in records(whole_run("TP2 PP2")):
        parts = {part: line[f"seconds/{part}"] for part in part_timer.PARTS}
        assert sum(parts.values()) == pytest.approx(line["seconds"], rel=0.02)
        assert parts["output"] == 0 and "tflops_per_rank/output" not in line
        assert parts["layers"] > 0 and parts["waiting"] > 0 and "tflops_per_rank/layers" in line
