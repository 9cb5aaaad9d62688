"""Training jobs on the test cluster: submit, look, freeze, wait."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.slurm.cluster import Cluster, wait_for
from tests.train.layouts import layout
from tests.train.smoke import overrides

STEPS = 8
"""Of each stage; with a checkpoint every third."""
SMOKE_STAGES = ("pretrain", "sft")
PATIENCE_S = 420
"""For a life of a run on two cores that others use too."""
SCRIPT = "launch/slurm.sbatch"
_OVER = {"CANCELLED", "COMPLETED", "FAILED", "NODE_FAIL", "PREEMPTED", "TIMEOUT"}

ENVIRONMENT = {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
}
"""sbatch hands the submitter's environment on, so that `python` is the one that runs the tests."""


def smoke_arguments(data: Path, run_dir: Path) -> list[str]:
    """Returns the arguments for TP2 x PP2 in both stages, with wandb."""
    _, parallel = layout("TP2 PP2")
    steps = [f"stages.{stage}.steps={STEPS}" for stage in SMOKE_STAGES]
    own = [*parallel, *steps, "checkpoint.interval_steps=3", "tracking.wandb=offline"]
    return overrides(data, run_dir, *own)


class Job:
    """Submits the smoke recipe over both nodes, two ranks each, and looks at the job."""

    def __init__(
        self,
        cluster: Cluster,
        data: Path,
        run_dir: Path,
        *options: str,
        more: tuple[str, ...] = (),
    ) -> None:
        self._cluster = cluster
        self.run_dir, self.log_file = run_dir, run_dir.with_suffix(".log")
        arguments = [*smoke_arguments(data, run_dir), *more]
        self.id = submit(cluster, self.log_file, *options, SCRIPT, *arguments)

    @property
    def state(self) -> str:
        return self._cluster.job(self.id)["JobState"]

    @property
    def restarts(self) -> int:
        return int(self._cluster.job(self.id)["Restarts"])

    @property
    def log(self) -> str:
        return self.log_file.read_text() if self.log_file.exists() else ""

    def wait_for_log(self, words: str) -> None:
        wait_for(lambda: words in self.log, PATIENCE_S, words, self.explain)

    def wait_for_save(self, step: int) -> None:
        """Waits for the checkpoint of a step of the first stage."""
        newest = self.run_dir / "checkpoints" / f"pretrain-{step:08d}"
        wait_for(newest.exists, PATIENCE_S, f"the save of step {step}", self.explain)

    def wait_for_restart(self, number: int) -> None:
        """Waits until SLURM has put the job back into the queue so many times."""
        wait_for(lambda: self.restarts >= number, PATIENCE_S, "a requeue", self.explain)

    def wait(self) -> str:
        """Waits for the end; the state at the end."""
        wait_for(lambda: self.state in _OVER, PATIENCE_S, "the end", self.explain)
        return self.state

    @contextmanager
    def rank_0_frozen(self) -> Iterator[psutil.Process]:
        """Holds the run still, so that an event finds it in the middle however fast it is."""
        process = self.rank(0)
        process.send_signal(signal.SIGSTOP)
        yield process
        if process.is_running():
            process.send_signal(signal.SIGCONT)

    def rank(self, rank: int) -> psutil.Process:
        """Returns a rank's process. Processes that the rank started are younger."""
        found = [
            each
            for node in self._cluster.nodes
            for each in self._cluster.processes(node, f"{self.run_dir} ")
            if each.name().startswith("python") and each.environ().get("RANK") == str(rank)
        ]
        return min(found, key=lambda each: each.create_time())

    def pid_in_node(self, rank: int) -> int:
        """Returns the process id that the rank's own node uses."""
        status = Path(f"/proc/{self.rank(rank).pid}/status").read_text()
        return int(re.findall(r"^NSpid:.*\t(\d+)$", status, re.MULTILINE)[0])

    def explain(self) -> str:
        shown = self._cluster.run("scontrol", "show", "job", self.id).stdout
        return f"{shown}\n{self.log[-6000:]}\n{self._cluster.logs()}"


def submit(cluster: Cluster, log_file: Path, *arguments: str) -> str:
    """Calls sbatch for both nodes, two tasks each. Returns the job's id."""
    size = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", f"--output={log_file}"]
    done = cluster.run("sbatch", "--parsable", *size, *arguments, environment=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def wandb_ids(run_dir: Path) -> set[str]:
    """Returns the wandb runs that a run directory holds."""
    names = [path.name for path in (run_dir / "wandb").glob("offline-run-*")]
    return {re.sub(r"offline-run-\d+_\d+-", "", name) for name in names}


def left_over(cluster: Cluster) -> list[str]:
    """Returns the processes of training on any node."""
    return [
        f"{node}: {process}"
        for node in cluster.nodes
        for word in ("nvlm_train", "wandb-core")
        for process in cluster.processes(node, word)
    ]
