"""A damaged newest checkpoint is found by every rank and reported, and the one before is used."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.train import runs
from tests.train.checkpoint import saves
from tests.train.layouts import layout
from tests.train.smoke import read_metrics
from tests.workers import WorkerPool

WholeRun = Callable[..., Path]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "__0_0.distcp": (flip, "other bytes than were written"),
    "__1_0.distcp": (truncate, "bytes of"),
    "common.pt": (Path.unlink, "is missing"),
    ".metadata": (flip, "other bytes than were written"),
    "state.json": (truncate, "bytes of"),
    "manifest.json": (Path.unlink, "is missing"),
}


@pytest.fixture(scope="module")
def stopped(workers: WorkerPool, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes a run that stopped after step 3, with checkpoints of steps 2 and 3; it must not be changed."""
    run_dir = tmp_path_factory.mktemp("stopped") / "run"
    world, parallel = layout("DP2")
    workers.run(world, _stop, data, run_dir, parallel)
    return run_dir


def _stop(data: Path, run_dir: Path, parallel: list[str]) -> int:
    return runs.run(data, run_dir, *parallel, stop_after=3)


@pytest.mark.parametrize("name", DAMAGE)
def test_every_rank_finds_it(workers: WorkerPool, stopped: Path, tmp_path: Path, name: str) -> None:
    spoil, reason = DAMAGE[name]
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(stopped / "checkpoints" / "pretrain-00000003", checkpoint)
    assert workers.run(2, saves.damage_of, checkpoint) == [[], []]
    spoil(checkpoint / name)
    for found in workers.run(2, saves.damage_of, checkpoint):
        assert len(found) == 1 and name in found[0] and reason in found[0]


@pytest.mark.slow
def test_the_one_before_is_used(
    workers: WorkerPool, data: Path, stopped: Path, tmp_path: Path, whole_run: WholeRun
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(stopped, run_dir)
    flip(run_dir / "checkpoints" / "pretrain-00000003" / "__1_0.distcp")
    world, parallel = layout("DP2")
    (end, heard), (other_end, silent) = workers.run(
        world, saves.run_and_listen, data, run_dir, *parallel
    )
    assert end == other_end == 0
    assert read_metrics(run_dir) == read_metrics(whole_run("DP2"))
    assert silent == []
    assert heard[0].startswith("CHECKPOINT IS DAMAGED") and "__1_0.distcp" in heard[0]
    assert "using the one before" in heard[1] and "pretrain-00000002" in heard[1]
    assert (run_dir / "checkpoints" / "damaged-pretrain-00000003").is_dir()


def test_no_silent_start_from_nothing(
    workers: WorkerPool, data: Path, stopped: Path, tmp_path: Path
) -> None:
    """When every checkpoint is damaged the run ends, and nothing is renamed."""
    run_dir = tmp_path / "run"
    shutil.copytree(stopped, run_dir)
    before = sorted((run_dir / "checkpoints").iterdir())
    for checkpoint in before:
        (checkpoint / "common.pt").unlink()
    world, parallel = layout("DP2")
    for end, _ in workers.run(world, saves.run_and_listen, data, run_dir, *parallel):
        assert "no undamaged checkpoint is left" in str(end)
    assert sorted((run_dir / "checkpoints").iterdir()) == before
