"""Interrupted and uninterrupted runs are the same run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.train import runs
from tests.train.health import ills
from tests.train.layouts import NO_DROPOUT, layout
from tests.train.resume.interrupted import WholeRun, assert_continues_bit_for_bit, stop
from tests.train.smoke import make_smoke_data, read_metrics
from tests.workers import WorkerPool

slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "stop_after"),
    [
        ("PP2", 4),
        pytest.param("TP2", 1, marks=slow),
        pytest.param("single", 6, marks=slow),
        pytest.param("single", 1, marks=slow),
        pytest.param("single", 4, marks=slow),
        pytest.param("PP2", 1, marks=slow),
        pytest.param("TP2 PP2", 4, marks=slow),
        pytest.param("PP2", 6, marks=slow),
        pytest.param("TP2 PP2", 1, marks=slow),
        pytest.param("TP2 PP2", 6, marks=slow),
        pytest.param("DP2", 1, marks=slow),
        pytest.param("DP2", 4, marks=slow),
        pytest.param("PP2 DP2", 1, marks=slow),
        pytest.param("PP2 DP2", 6, marks=slow),
    ],
)
def test_stopped_run_continues_bit_for_bit(
    workers: WorkerPool,
    data: Path,
    tmp_path: Path,
    whole_run: WholeRun,
    name: str,
    stop_after: int,
) -> None:
    """Dropout is on, so that the RNG counts; step 4 is the hand-over between the stages."""
    assert_continues_bit_for_bit(workers, data, tmp_path, whole_run, name, stop_after)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param("DP2", "TP2", marks=slow),
        pytest.param("single", "DP2", marks=slow),
        pytest.param("DP2", "single", marks=slow),
        pytest.param("TP2 PP2", "PP2 DP2", marks=slow),
        pytest.param("PP2 DP2", "PP2 DP2 without overlap", marks=slow),
    ],
)
def test_resume_in_another_layout(
    workers: WorkerPool, data: Path, tmp_path: Path, whole_run: WholeRun, before: str, after: str
) -> None:
    """Samples are equal, losses agree to 1e-4. Dropout is off, because masks depend on the layout."""
    world, overrides = layout(before)
    workers.run(world, stop, data, tmp_path / "moved", 6, [*overrides, *NO_DROPOUT])
    world, overrides = layout(after)
    workers.run(world, runs.run, data, tmp_path / "moved", *overrides, *NO_DROPOUT)
    expected, found = (
        read_metrics(whole_run("single", *NO_DROPOUT)),
        read_metrics(tmp_path / "moved"),
    )
    assert [each["samples_hash"] for each in found] == [each["samples_hash"] for each in expected]
    assert [each["loss"] for each in found] == pytest.approx(
        [each["loss"] for each in expected], rel=1e-4
    )
    assert [each["grad_norm"] for each in found] == pytest.approx(
        [each["grad_norm"] for each in expected], rel=1e-3
    )


@slow
def test_stages_may_have_different_layouts(
    workers: WorkerPool, data: Path, tmp_path: Path, whole_run: WholeRun
) -> None:
    """Pretraining runs at TP2, SFT at PP2: the checkpoint itself reshards the weights."""
    overrides = ["stages.pretrain.parallel.tensor=2", "stages.sft.parallel.pipeline=2", *NO_DROPOUT]
    workers.run(2, runs.run, data, tmp_path / "two", *overrides)
    both = (whole_run("single", *NO_DROPOUT), tmp_path / "two")
    losses = [[each["loss"] for each in read_metrics(run)] for run in both]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.slow
def test_an_earlier_stages_engine_is_gone(workers: WorkerPool, data: Path, tmp_path: Path) -> None:
    """Its weights and optimizer are gone too: a stage needs no memory for two of them."""
    for counts in workers.run(2, ills.engines_alive, data, tmp_path, *layout("TP2")[1]):
        assert counts == [1] * len(counts) and len(counts) > 6


@slow
def test_finished_run_does_nothing(workers: WorkerPool, data: Path, tmp_path: Path) -> None:
    workers.run(1, runs.run, data, tmp_path / "run")
    before = read_metrics(tmp_path / "run")
    assert workers.run(1, runs.run, data, tmp_path / "run") == [0]
    assert read_metrics(tmp_path / "run") == before


def test_half_written_checkpoint_is_not_used(
    workers: WorkerPool, data: Path, tmp_path: Path
) -> None:
    workers.run(1, stop, data, tmp_path / "run", 3, [])
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.copytree(checkpoints / "pretrain-00000003", checkpoints / "writing-pretrain-00000004")
    assert workers.run(1, runs.run, data, tmp_path / "run") == [0]
    assert not list(checkpoints.glob("writing-*"))
    assert [each["global_step"] for each in read_metrics(tmp_path / "run")] == list(range(1, 9))


@slow
def test_only_the_last_checkpoints_are_kept(
    workers: WorkerPool, data: Path, tmp_path: Path
) -> None:
    workers.run(1, runs.run, data, tmp_path / "run", "checkpoint.keep_last=1")
    kept = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert kept == ["sft-00000004"]


def test_another_recipe_is_refused(workers: WorkerPool, data: Path, tmp_path: Path) -> None:
    workers.run(1, stop, data, tmp_path / "run", 6, [])
    changed = ["stages.sft.batch.size=8", "seed=1", "model.projector.ffn_hidden_size=32"]
    message = workers.run(1, _refusal, data, tmp_path / "run", changed)[0]
    assert "stages.sft.batch.size=8, was 4" in message
    assert "seed=1, was 1234" in message
    assert "model.projector.ffn_hidden_size=32, was 64" in message
    assert "another run_dir" in message


@slow
def test_changed_shard_is_refused_by_name(workers: WorkerPool, data: Path, tmp_path: Path) -> None:
    own = tmp_path / "data"
    make_smoke_data(own)
    workers.run(1, stop, own, tmp_path / "run", 6, [])
    shutil.copy(own / "text-000001.tar", own / "text-000000.tar")
    message = workers.run(1, _refusal, own, tmp_path / "run", [])[0]
    assert "text-000000.tar" in message and "changed" in message


def test_missing_shard_stops_every_rank(workers: WorkerPool, tmp_path: Path) -> None:
    """Rank 0 indexes alone. The others must not wait for it after it gave up."""
    own = tmp_path / "data"
    make_smoke_data(own)
    (own / "vqa-000001.tar").unlink()
    for message in workers.run(2, _refusal, own, tmp_path / "run", []):
        assert f"missing shard={own}/vqa-000001.tar" in message


def _refusal(data: Path, run_dir: Path, overrides: list[str]) -> str:
    from nvlm_train.errors import NvlmError

    with pytest.raises(NvlmError) as caught:
        runs.run(data, run_dir, *overrides)
    return str(caught.value)
