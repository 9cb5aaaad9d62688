"""Before and around training, on a real SLURM: what is refused, tried again, and asked of squeue."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.jobs import ENVIRONMENT, PATIENCE_S, SCRIPT, Job, smoke_arguments, submit

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def wait_until_over(cluster: Cluster, job: str, log_file: Path) -> None:
    wait_for(
        lambda: cluster.job(job)["JobState"] in ("FAILED", "COMPLETED"),
        PATIENCE_S, "the end", lambda: log_file.read_text() + cluster.logs(),
    )  # fmt: skip


def dry_run(cluster: Cluster, *arguments: str):
    command = [sys.executable, "-m", "nvlm_train", "launch", "--dry-run", *arguments]
    return cluster.run(*command, environment=ENVIRONMENT)


def test_dry_run_asks_slurm(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    run = [*smoke_arguments(data, tmp_path / "run"), "--nodes=2", "--gpus-per-node=2"]
    good = dry_run(cluster, *run)
    assert good.returncode == 0, good.stderr
    assert "ok: sbatch --test-only: Job" in good.stdout
    for option, complaint in (("--partition=nowhere", "partition"), ("--nodes=3", "node")):
        bad = dry_run(cluster, *run, f"--sbatch={option}")
        assert bad.returncode == 2
        assert "SLURM refuses it" in bad.stderr and complaint in bad.stderr
    assert cluster.ask("squeue", "--noheader") == ""


def test_a_wrong_recipe_is_not_tried_again(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    job = Job(cluster, data, tmp_path / "run", more=("sede=1",))
    assert job.wait() == "FAILED"
    assert cluster.job(job.id)["ExitCode"] == "2:0" and job.restarts == 0
    assert "sede=1 is an unknown key" in job.log


def test_crashes_at_once_are_tried_a_few_times(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENVIRONMENT, "NVLM_QUICK_CRASHES", "1")
    monkeypatch.setitem(ENVIRONMENT, "PATH", "/usr/bin:/bin")  # a python without nvlm_train's needs
    job = submit(cluster, tmp_path / "log", SCRIPT, "experiment=smoke")
    wait_until_over(cluster, job, tmp_path / "log")
    assert cluster.job(job)["Restarts"] == "1"
    assert (
        "crashed within 10 minutes, after 1 restarts; not requeued"
        in (tmp_path / "log").read_text()
    )


def test_a_container_needs_pyxis(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENVIRONMENT, "NVLM_IMAGE", "image.sqsh")
    job = submit(cluster, tmp_path / "log", SCRIPT, "experiment=smoke")
    wait_until_over(cluster, job, tmp_path / "log")
    assert cluster.job(job)["ExitCode"] == "2:0"
    assert "install pyxis or unset NVLM_IMAGE" in (tmp_path / "log").read_text()


def test_an_array_runs_its_lines(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two lines are each wrong in their own way, so that each job says which one it ran."""
    (tmp_path / "lines").write_text(
        "# comment\nexperiment=smoke sede=1\n\nexperiment=smoke sed=2\n"
    )
    monkeypatch.setitem(ENVIRONMENT, "NVLM_ABLATIONS", str(tmp_path / "lines"))
    array = submit(cluster, tmp_path / "log-%a", "--array=0-1", SCRIPT)
    for number, key in enumerate(("sede=1", "sed=2")):
        log = tmp_path / f"log-{number}"
        wait_until_over(cluster, f"{array}_{number}", log)
        assert f"{key} is an unknown key" in log.read_text()


def test_squeue_says_who_is_alive(cluster: Cluster, tmp_path: Path) -> None:
    """squeue is asked about a running job, the same one cancelled, and one that never was."""
    job = submit(cluster, tmp_path / "log", "--wrap=sleep 100")
    wait_for(lambda: cluster.job(job)["JobState"] == "RUNNING", 30, "a running job", cluster.logs)
    assert _asked(cluster, job) == "SLURM has its job as RUNNING"
    cluster.ask("scancel", job)
    wait_for(lambda: _asked(cluster, job) == "None", 60, "a dead job", cluster.logs)
    assert _asked(cluster, "999999") == "None"


def _asked(cluster: Cluster, job: str) -> str:
    question = f"from nvlm_train.train.run_lock import slurm_says_alive as s; print(s('{job}'))"
    done = cluster.run(sys.executable, "-c", question)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
