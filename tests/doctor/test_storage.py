"""The run directory and its disk: a small tmpfs, a lock that another process holds, a real checkpoint."""

from __future__ import annotations

import fcntl
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nvlm_train import costs
from nvlm_train.config.schema import Recipe
from nvlm_train.doctor.storage import check_disk, check_run_dir
from nvlm_train.train.run_lock import FILE_NAME as OWNER_FILE

Make = Callable[..., Recipe]


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """Makes a file system of 4 MiB."""
    place = tmp_path / "tiny"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("needs root, to mount a small tmpfs")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def levels(findings: Iterator) -> list[str]:
    return [each.level for each in findings]


def test_room_for_checkpoints(recipe: Make) -> None:
    found = list(check_disk(recipe()))
    assert {each.level for each in found} == {"ok"}
    assert "3 checkpoints" in found[-1].text


def test_a_disk_that_is_too_small(recipe: Make, tiny_disk: Path) -> None:
    *_, last = check_disk(recipe(f"run_dir={tiny_disk}/run"))
    assert last.level == "error" and "4.2 MB free" in last.text
    # One copy, and the one being written, take 7.2 MB; without the second stage 2.1 MB fit.
    small = recipe(f"run_dir={tiny_disk}/run", "checkpoint.keep_last=1", "schedule=[pretrain]")
    assert levels(check_disk(small))[-1] == "ok"


def test_checkpoints_that_are_there_count(recipe: Make, tiny_disk: Path) -> None:
    old = tiny_disk / "run" / "checkpoints" / "sft-00000002"
    old.mkdir(parents=True)
    (old / "shard").write_bytes(bytes(3_500_000))
    made = recipe(f"run_dir={tiny_disk}/run", "checkpoint.keep_last=1")
    needs = list(check_disk(made))[-1].text
    assert f"need {(2 * 2.7 - 3.5):.1f} MB more" in needs


def test_a_directory_that_is_nobodys(recipe: Make) -> None:
    assert levels(check_run_dir(recipe())) == ["ok"]


def test_a_read_only_place(recipe: Make, tiny_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    (found,) = check_run_dir(recipe(f"run_dir={tiny_disk}/run"))
    assert found.level == "error" and "Read-only" in found.text


def test_another_job_holds_the_run(recipe: Make) -> None:
    made = recipe()
    path = Path(made.run_dir) / OWNER_FILE
    path.parent.mkdir(parents=True)
    path.write_text('{"host": "node7"}')
    assert levels(check_run_dir(made)) == ["ok"], "a file that nobody locks is a dead job's"
    with path.open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        (found,) = check_run_dir(made)
    assert found.level == "error" and "node7" in found.text


@pytest.mark.slow
@pytest.mark.parametrize("distributed", ["true", "false"])
def test_checkpoint_sizes_are_what_is_written(
    workers, original: Path, tmp_path: Path, distributed: str
) -> None:
    from tests.train import runs
    from tests.train.smoke import smoke_recipe

    own = ["stages.pretrain.steps=2", "stages.sft.steps=2"]
    own += [f"stages.{s}.parallel.distributed_optimizer={distributed}" for s in ("pretrain", "sft")]
    assert workers.run(1, runs.run, original, tmp_path / "run", *own) == [0]
    made = smoke_recipe(original, tmp_path / "run", *own)
    for name in made.schedule:
        directory = tmp_path / "run" / "checkpoints" / f"{name}-00000002"
        written = sum(path.stat().st_size for path in directory.iterdir())
        said = costs.checkpoint_bytes(made.model, made.stages[name], made.precision)
        # Names, places and RNG states are 0.2 MB, which only a toy model feels.
        assert said < written < said * 1.05 + 400_000, (name, said, written)
