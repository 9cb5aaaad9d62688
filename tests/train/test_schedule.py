"""The learning rate and the order of stages, as functions of the step."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nvlm_train.config.schema import OptimizerConfig, Recipe
from nvlm_train.recipe.load import load_recipe
from nvlm_train.train.schedule import Position, global_step, learning_rate, stages_to_run

SETTINGS = OptimizerConfig(lr=1.0, min_lr=0.1, warmup_steps=4)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    """Returns a recipe with four steps of pretraining, then six of SFT."""
    smoke = load_recipe(["experiment=smoke"])
    stages = {**smoke.stages, "sft": replace(smoke.stages["sft"], steps=6)}
    return replace(smoke, stages=stages)


def test_warm_up_is_linear_and_ends_at_the_peak() -> None:
    rates = [learning_rate(SETTINGS, step, 25) for step in range(5)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_cosine_ends_at_the_minimum() -> None:
    rates = [learning_rate(SETTINGS, step, 25) for step in range(4, 25)]
    assert rates[0] == 1.0 and rates[-1] == pytest.approx(0.1)
    assert rates[10] == pytest.approx(0.55), "half way is the mean of both ends"
    assert rates == sorted(rates, reverse=True)
    assert learning_rate(SETTINGS, 1000, 25) == pytest.approx(0.1)


@pytest.mark.parametrize("steps", [1, 4, 5])
def test_short_stages_have_a_rate(steps: int) -> None:
    """Stages no longer than their warm-up, or one step longer."""
    rates = [learning_rate(SETTINGS, step, steps) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)


def test_without_warm_up_the_first_step_has_the_peak() -> None:
    assert learning_rate(replace(SETTINGS, warmup_steps=0), 0, 10) == 1.0


def test_global_step_counts_earlier_stages(recipe: Recipe) -> None:
    assert global_step(recipe, Position("pretrain", 3)) == 3
    assert global_step(recipe, Position("sft", 0)) == 4
    assert global_step(recipe, Position("sft", 6)) == 10


@pytest.mark.parametrize(
    ("done", "expected"),
    [
        (None, [("pretrain", 0), ("sft", 0)]),
        (("pretrain", 3), [("pretrain", 3), ("sft", 0)]),
        (("pretrain", 4), [("sft", 0)]),
        (("sft", 2), [("sft", 2)]),
        (("sft", 6), []),
    ],
)
def test_finished_stages_are_skipped(
    recipe: Recipe, done: tuple[str, int] | None, expected: list[tuple[str, int]]
) -> None:
    position = Position(*done) if done else None
    found = [(each.stage, each.step) for each in stages_to_run(recipe, position)]
    assert found == expected
