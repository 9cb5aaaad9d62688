"""Files that count and are in no checkpoint may not change while a run lasts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvlm_train.train.signals import EXIT_REQUEUE
from tests.train.checkpoint import outside
from tests.train.resume.interrupted import stop
from tests.train.smoke import read_metrics, smoke_recipe
from tests.workers import WorkerPool

RESUME, HAND_OVER = 1, 4
"""Steps after which a run was stopped: inside pretraining, and at its end."""


@pytest.fixture(scope="module")
def files(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes an encoder and a tokenizer, which must not be changed."""
    root = tmp_path_factory.mktemp("files")
    vision = smoke_recipe(data, root).model.vision
    outside.make_files(root, data, vision)
    return root


@pytest.fixture(scope="module")
def stopped(
    workers: WorkerPool, data: Path, files: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, Path]:
    """Returns run directories by the step after which training stopped; they must not be changed."""
    found = {}
    for step in (RESUME, HAND_OVER):
        found[step] = tmp_path_factory.mktemp("stopped") / "run"
        codes = workers.run(2, stop, data, found[step], step, outside.overrides(files))
        assert codes == [EXIT_REQUEUE] * 2
    return found


@pytest.fixture
def own(files: Path, tmp_path: Path) -> Iterator[Path]:
    """Returns a copy of a run directory. The files that its recipe names are restored afterwards."""
    shutil.copytree(files, tmp_path / "kept")
    yield tmp_path
    for path in ("encoder/model.safetensors", "tokenizer.json"):
        shutil.copy(tmp_path / "kept" / path, files / path)


@pytest.mark.parametrize("step", [RESUME, pytest.param(HAND_OVER, marks=pytest.mark.slow)])
@pytest.mark.parametrize("field", outside.CHANGES)
def test_other_files_of_the_same_name_are_refused(
    workers: WorkerPool,
    data: Path,
    files: Path,
    stopped: dict[int, Path],
    own: Path,
    field: str,
    step: int,
) -> None:
    """All ranks refuse them, for training and for answers. With the old files back the run goes on."""
    run_dir = own / "run"
    shutil.copytree(stopped[step], run_dir)
    outside.CHANGES[field](files)
    for ask in (outside.refusal, outside.refusal_to_answer):
        for message in workers.run(2, ask, data, run_dir, files):
            assert f"checkpoints/pretrain-{step:08d} was trained with other files" in message
            assert message.count("  - ") == 1 and f"  - {field}={files}/" in message
            assert "put those back, or start a new run with another run_dir" in message
    assert len(read_metrics(run_dir)) == step


def test_all_that_changed_is_named(
    workers: WorkerPool, data: Path, files: Path, stopped: dict[int, Path], own: Path
) -> None:
    for change in outside.CHANGES.values():
        change(files)
    message = workers.run(2, outside.refusal, data, stopped[RESUME], files)[0]
    assert all(f"  - {field}=" in message for field in outside.CHANGES)


def test_unchanged_files_go_on_without_a_word(
    workers: WorkerPool, data: Path, files: Path, stopped: dict[int, Path], tmp_path: Path
) -> None:
    shutil.copytree(stopped[HAND_OVER], tmp_path / "run")
    assert workers.run(2, outside.warnings_of_run, data, tmp_path / "run", files) == [[], []]
    assert len(read_metrics(tmp_path / "run")) == 8


@pytest.mark.slow
def test_a_run_of_an_older_version_goes_on_with_a_warning(
    workers: WorkerPool, data: Path, files: Path, stopped: dict[int, Path], tmp_path: Path
) -> None:
    """Rank 0 warns once, though two stages follow: the next save records which files they were."""
    shutil.copytree(stopped[RESUME], tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    outside.forget(checkpoints / "pretrain-00000001")
    said, silence = workers.run(2, outside.warnings_of_run, data, tmp_path / "run", files)
    assert silence == [] and len(said) == 1
    assert "model.vision.weights and model.tokenizer.path were" in said[0]
    assert "could not be checked" in said[0]
    state = json.loads((checkpoints / "sft-00000004" / "state.json").read_text())
    assert set(state["outside"]) == set(outside.CHANGES)


def test_nodes_with_other_files_are_refused(
    workers: WorkerPool, data: Path, files: Path, tmp_path: Path
) -> None:
    """Copies on local disks have one path; what counts is what is in them. Every rank says so."""
    shutil.copytree(files, tmp_path / "node")
    roots = [files, tmp_path / "node"]
    first, second = workers.run(2, outside.digests_of_nodes, data, roots)
    assert first == second and set(first) == set(outside.CHANGES)
    outside.turn_a_sign(tmp_path / "node")
    for message in workers.run(2, outside.digests_of_nodes, data, roots):
        assert message.count("  - ") == 1 and "  - model.vision.weights has digest" in message
        assert "on rank 1" in message
    (tmp_path / "node" / "tokenizer.json").unlink()
    for message in workers.run(2, outside.digests_of_nodes, data, roots):
        assert message.startswith("rank 1 could not read what counts:\n")
        assert f"model.tokenizer.path={tmp_path}/node/tokenizer.json: no such file" in message
