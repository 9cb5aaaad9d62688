"""Directories of checkpoints without any tensor: order, completeness, damage, retention."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvlm_train.config.schema import CheckpointConfig
from nvlm_train.errors import CheckpointError
from nvlm_train.recipe.load import load_recipe
from nvlm_train.train.checkpoint import directory as files
from nvlm_train.train.checkpoint.manifest import FILE_NAME, damage, digest_file, read_manifest
from nvlm_train.train.checkpoint.run_state import RunState, plain_recipe, write_state


@pytest.fixture(scope="module")
def state() -> RunState:
    """Returns the state at the first of four steps of pretraining."""
    return RunState(
        "pretrain", 1, plain_recipe(load_recipe(["experiment=smoke"])), (1, 1, 1), {}, {}, None, {}
    )


def save(run_dir: Path, state: RunState) -> Path:
    """Does what a saver does, with a shard of 100 bytes."""
    files.open_directory(run_dir)
    name = f"{state.stage}-{state.step:08d}"
    writing = files.begin(run_dir, name)
    shard = writing / "__0_0.distcp"
    shard.write_bytes(bytes(range(100)))
    write_state(state, writing)
    return files.publish(writing, name, {shard.name: digest_file(shard)})


def problems(checkpoint: Path) -> list[str]:
    try:
        manifest = read_manifest(checkpoint)
    except CheckpointError as error:
        return [str(error)]
    return damage(checkpoint, manifest, manifest.files)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, state: RunState) -> Path:
    """Makes a complete checkpoint, which must not be changed."""
    return save(tmp_path_factory.mktemp("run"), state)


def test_what_was_saved_is_whole(checkpoint: Path) -> None:
    assert problems(checkpoint) == []
    assert set(read_manifest(checkpoint).files) == {"__0_0.distcp", "state.json"}


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_every_changed_byte_is_found(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Every file, the manifest too, is cut off or has one other byte."""
    name = data.draw(st.sampled_from(sorted(path.name for path in checkpoint.iterdir())))
    before = (checkpoint / name).read_bytes()
    place = data.draw(st.integers(0, len(before) - 1))
    flipped = before[place] ^ data.draw(st.integers(1, 255))
    after = data.draw(
        st.sampled_from([before[:place], before[:place] + bytes([flipped]) + before[place + 1 :]])
    )
    broken = tmp_path_factory.mktemp("broken") / "c"
    shutil.copytree(checkpoint, broken)
    (broken / name).write_bytes(after)
    found = problems(broken)
    if name == FILE_NAME and not found:  # the newline at its end says nothing
        assert read_manifest(broken) == read_manifest(checkpoint)
    else:
        assert len(found) == 1 and name in found[0]


@pytest.mark.parametrize("name", ["__0_0.distcp", "state.json", FILE_NAME])
def test_missing_file_is_found(checkpoint: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(checkpoint, tmp_path / "c")
    (tmp_path / "c" / name).unlink()
    assert problems(tmp_path / "c") == [f"{name} is missing"]


def test_order_is_the_order_of_saving_even_in_a_copy(tmp_path: Path, state: RunState) -> None:
    """Steps can go back (after a damaged checkpoint), and a copy has times of its own."""
    steps = [3, 1, 2]
    saved = [save(tmp_path / "run", replace(state, step=step)).name for step in steps]
    for age, name in enumerate(saved):
        for path in (tmp_path / "run" / "checkpoints" / name, *(tmp_path / "run").rglob("*")):
            os.utime(path, (1e9 - age, 1e9 - age))
    assert [path.name for path in files.complete_checkpoints(tmp_path / "run")] == saved


def test_without_manifest_it_is_not_complete_but_not_overlooked(
    tmp_path: Path, state: RunState
) -> None:
    newest = save(tmp_path, replace(state, step=2))
    save(tmp_path, replace(state, step=3))
    (newest / FILE_NAME).unlink()
    assert newest not in files.complete_checkpoints(tmp_path)
    assert files.named_checkpoints(tmp_path)[-1] == newest


@pytest.mark.parametrize("keep_stage_ends", [False, True])
def test_retention(tmp_path: Path, state: RunState, keep_stage_ends: bool) -> None:
    """Pretraining has four steps, and so has SFT."""
    for stage, steps in (("pretrain", (2, 4)), ("sft", (1, 2, 3))):
        for step in steps:
            save(tmp_path, replace(state, stage=stage, step=step))
    files.prune(tmp_path, CheckpointConfig(keep_last=2, keep_stage_ends=keep_stage_ends))
    ends = ["pretrain-00000004"] if keep_stage_ends else []
    left = [path.name for path in files.named_checkpoints(tmp_path)]
    assert left == [*ends, "sft-00000002", "sft-00000003"]


def test_a_checkpoint_that_is_read_stays(tmp_path: Path, state: RunState) -> None:
    config = CheckpointConfig(keep_last=1)
    first = save(tmp_path, state)
    with files.being_read(first):
        save(tmp_path, replace(state, step=2))
        files.prune(tmp_path, config)
        assert problems(first) == []
    files.prune(tmp_path, config)
    assert not first.exists()
    with pytest.raises(CheckpointError, match="was removed"), files.being_read(first):
        pass


def test_the_only_one_stays(tmp_path: Path, state: RunState) -> None:
    only = save(tmp_path, state)
    files.prune(tmp_path, CheckpointConfig(keep_last=1))
    assert problems(only) == []


def test_left_overs_of_killed_processes_go(tmp_path: Path, state: RunState) -> None:
    kept = save(tmp_path, state)
    files.begin(tmp_path, "pretrain-00000002")
    kept.with_name("removing-pretrain-00000000").mkdir()
    files.open_directory(tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == [kept]


def test_damaged_one_is_set_aside_and_kept(tmp_path: Path, state: RunState) -> None:
    bad = save(tmp_path, state)
    aside = files.set_aside(bad)
    assert aside.name == "damaged-pretrain-00000001" and aside.is_dir()
    assert files.named_checkpoints(tmp_path) == []


def test_unwritable_place_is_refused_before_training(tmp_path: Path) -> None:
    """A file is in the way: unlike permissions, it also stops root."""
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match="use another run_dir"):
        files.open_directory(tmp_path)


def test_read_only_file_system_is_refused(tmp_path: Path, state: RunState) -> None:
    if os.geteuid():
        pytest.skip("needs root to mount a tmpfs")
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "tmpfs", tmp_path], check=False, capture_output=True
    )
    if mount.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mount.stderr.decode().strip()}")
    try:
        saved = save(tmp_path, state)
        subprocess.run(["mount", "-o", "remount,ro", tmp_path], check=True)
        with pytest.raises(CheckpointError, match=r"Read-only file system.*\n?.*make it writable"):
            files.open_directory(tmp_path)
        assert problems(saved) == []
        files.prune(tmp_path, CheckpointConfig(keep_last=1))
    finally:
        subprocess.run(["umount", tmp_path], check=True)
