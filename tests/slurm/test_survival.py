"""What clusters do to a run, done to it by a real SLURM on two nodes.

Whatever happened, the finished run has the losses and samples of the uninterrupted one, bit for bit, one
wandb run, and leaves no process behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nvlm_train.train.signals import EXIT_REQUEUE
from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.jobs import SMOKE_STAGES, STEPS, Job, left_over, submit, wandb_ids
from tests.train.smoke import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(autouse=True)
def nobody_is_left(cluster: Cluster) -> Iterator[None]:
    """Checks after each test that jobs and their processes are over."""
    yield
    cluster.run("scancel", "--user=root")
    wait_for(
        lambda: not left_over(cluster), 60, "the end of all ranks", lambda: str(left_over(cluster))
    )


def assert_same_run(job: Job, whole: Path) -> None:
    assert job.wait() == "COMPLETED", job.explain()
    assert read_metrics(job.run_dir) == read_metrics(whole)
    assert len(read_metrics(whole)) == 2 * STEPS
    assert len(wandb_ids(job.run_dir)) == 1


def test_two_nodes_train(cluster: Cluster, data: Path, tmp_path: Path, whole: Path) -> None:
    """The numbers are those under torchrun. A second job cannot write to the same directory."""
    job = Job(cluster, data, tmp_path / "run")
    job.wait_for_save(3)
    with job.rank_0_frozen():
        alone = [f"stages.{s}.parallel.{k}=1" for s in SMOKE_STAGES for k in ("tensor", "pipeline")]
        second = Job(
            cluster, data, tmp_path / "second", "--nodes=1", "--ntasks-per-node=1",
            more=(f"run_dir={job.run_dir}", *alone),
        )  # fmt: skip
        assert second.wait() == "FAILED", second.explain()
        assert f"belongs to process {job.pid_in_node(0)} on n1, SLURM job {job.id}" in second.log
    assert_same_run(job, whole)
    assert job.restarts == second.restarts == 0


def test_killed_worker_then_preempted(
    cluster: Cluster, data: Path, tmp_path: Path, whole: Path
) -> None:
    """The first life ends by kill -9, the second by a job of a higher partition."""
    job = Job(cluster, data, tmp_path / "run")
    job.wait_for_save(3)
    with job.rank_0_frozen():
        job.rank(3).kill()
        job.wait_for_restart(1)
    job.wait_for_save(6)
    with job.rank_0_frozen():
        urgent = submit(
            cluster, tmp_path / "urgent.log", "--partition=urgent", "--exclusive", "--wrap=sleep 2"
        )
        job.wait_for_log("got SIGUSR1")
    assert_same_run(job, whole)
    assert job.restarts >= 2
    assert f"srun ended with {EXIT_REQUEUE}" in job.log
    assert cluster.job(urgent)["JobState"] == "COMPLETED"


def test_time_limit(cluster: Cluster, data: Path, tmp_path: Path, whole: Path) -> None:
    """The limit is moved near. SLURM looks every 30 s."""
    job = Job(cluster, data, tmp_path / "run", "--time=60", "--signal=B:USR1@600")
    job.wait_for_save(3)
    with job.rank_0_frozen():
        cluster.ask("scontrol", "update", f"JobId={job.id}", "TimeLimit=8")
        job.wait_for_log("got SIGUSR1")
        cluster.ask("scontrol", "update", f"JobId={job.id}", "TimeLimit=60")
    assert_same_run(job, whole)
    assert job.restarts >= 1
    assert f"srun ended with {EXIT_REQUEUE}" in job.log


def test_killed_slurmd_then_node(cluster: Cluster, data: Path, tmp_path: Path, whole: Path) -> None:
    """Both belong to rank 0's node. Rank 0 survives its slurmd, and the next life must not write too."""
    job = Job(cluster, data, tmp_path / "run")
    job.wait_for_save(3)
    with job.rank_0_frozen():
        cluster.kill_slurmd("n1")
        job.wait_for_restart(1)
    cluster.start_slurmd("n1")
    job.wait_for_save(6)
    with job.rank_0_frozen():
        cluster.kill_node("n1")
    job.wait_for_restart(2)
    cluster.start_node("n1")
    assert_same_run(job, whole)
    assert job.restarts >= 2


def test_scancel_ends_it_and_the_same_command_goes_on(
    cluster: Cluster, data: Path, tmp_path: Path, whole: Path
) -> None:
    job = Job(cluster, data, tmp_path / "run")
    job.wait_for_save(3)
    with job.rank_0_frozen():
        cluster.ask("scancel", job.id)
    assert job.wait() == "CANCELLED"
    wait_for(lambda: not left_over(cluster), 60, "the end of all ranks", job.explain)
    assert 0 < len(read_metrics(job.run_dir)) < 2 * STEPS
    again = Job(cluster, data, tmp_path / "run")
    assert_same_run(again, whole)
    assert job.state == "CANCELLED" and job.restarts == 0
