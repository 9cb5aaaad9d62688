"""Eight seeded kills of a real four-rank run, two at each kind of moment; `make chaos` does fifty."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.chaos import MOMENTS, Chaos

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def test_killed_at_every_kind_of_moment(tmp_path: Path) -> None:
    chaos = Chaos(tmp_path, seed=7)
    chaos.kill(["data", "save", "log", "hand-over"])
    chaos.kill(["save", "any", "hand-over", "data"])
    assert set(chaos.done) == set(MOMENTS) and sum(chaos.done.values()) == 8
