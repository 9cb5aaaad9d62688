"""Eight seeded kills of a real four-rank run, at every kind of moment; `make chaos` does fifty."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.layouts import NO_DROPOUT
from tests.train.resume.chaos import MOMENTS, Chaos
from tests.train.smoke import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def test_killed_at_every_kind_of_moment(tmp_path: Path) -> None:
    chaos = Chaos(tmp_path, seed=7)
    chaos.kill(["data", "save", "log", "saved", "hand-over", "save", "any", "data"])
    assert set(chaos.done) == set(MOMENTS) and sum(chaos.done.values()) == 8


def test_goes_on_in_another_layout_after_a_kill(tmp_path: Path) -> None:
    """It is killed as TP2 x PP2 in the second stage and ended as PP2 x DP2: same samples, losses to 1e-4."""
    chaos = Chaos(tmp_path, seed=3, overrides=NO_DROPOUT)
    whole, moved = map(read_metrics, chaos.move("hand-over", "PP2 DP2"))
    assert [each["samples_hash"] for each in moved] == [each["samples_hash"] for each in whole]
    assert [each["loss"] for each in moved] == pytest.approx(
        [each["loss"] for each in whole], rel=1e-4
    )
