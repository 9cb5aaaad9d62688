"""A real SLURM on one Linux host: slurmctld, munged and slurmd on nodes that are namespaces.

A node has its own network, host name, mounts and processes; killing its PID 1 is its power cut. The
file system is shared, as on a cluster. Needs root and Debian's slurmctld, slurmd, slurm-client,
munge and iproute2. Nothing is touched outside the namespaces but the cluster's own directory.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from tests.slurm.settings import SUBNET, write_settings

TOOLS = ("slurmctld", "slurmd", "sbatch", "srun", "munged", "ip", "nsenter", "unshare")
HEAD = "head"


def missing() -> str | None:
    """Returns why no cluster can be made here; None when it can."""
    if os.geteuid() != 0:
        return "a SLURM cluster of namespaces needs root"
    lacking = [tool for tool in TOOLS if shutil.which(tool) is None]
    if lacking:
        return f"missing {', '.join(lacking)}: apt-get install slurmctld slurmd slurm-client munge iproute2"
    tried = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "true"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return None if tried.returncode == 0 else f"no namespaces here: {tried.stderr.strip()}"


class Cluster:
    """Runs from `start` to `stop`, or until this process ends."""

    def __init__(self, root: Path, num_nodes: int = 2) -> None:
        self._root = root
        self.nodes = [f"n{number}" for number in range(1, num_nodes + 1)]
        self._init: dict[str, subprocess.Popen[str]] = {}
        self._environment = {**os.environ, "SLURM_CONF": str(root / "slurm.conf")}

    def start(self) -> None:
        """Brings all nodes up; returns when SLURM has them idle."""
        self._root.mkdir(mode=0o711)
        (self._root / "state").mkdir()
        write_settings(self._root, len(self.nodes))
        options = {
            "key-file": "munge.key",
            "socket": "munge.socket",
            "seed-file": "munge.seed",
            "pid-file": "munge.pid",
            "log-file": "munged.log",
        }
        paths = [f"--{name}={self._root}/{file}" for name, file in options.items()]
        munged = " ".join(["munged", "--foreground", "--force", *paths])
        self._boot(HEAD, [munged, "slurmctld -D"], self._wire_head)
        for node in self.nodes:
            self.start_node(node)
        wait_for(lambda: self._idle() == set(self.nodes), 30, "idle nodes", self.logs)

    def stop(self) -> None:
        """Ends every node and all that runs on it."""
        for node in list(self._init):
            self.kill_node(node)

    def run(
        self, *command: str, on: str = HEAD, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command on a node."""
        return subprocess.run(
            [*self.enter(on), *command],
            env={**self._environment, **(environment or {})},
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    def enter(self, node: str) -> list[str]:
        """Returns what to put before a command that runs on a node, in the current directory."""
        spaces = ["--net", "--uts", "--mount", "--pid"]
        return ["nsenter", f"--target={self.pid(node)}", *spaces, f"--wd={os.getcwd()}", "--"]

    def ask(self, *command: str) -> str:
        """Runs a command that must succeed. Returns what it prints."""
        done = self.run(*command)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """Returns SLURM's fields of a job, such as JobState and Restarts."""
        return dict(re.findall(r"(\w+)=(\S*)", self.ask("scontrol", "show", "job", "-o", job)))

    def processes(self, node: str, word: str) -> list[psutil.Process]:
        """Returns a node's processes with a word in their command line, as this host sees them."""
        space = os.readlink(f"/proc/{self.pid(node)}/ns/pid")
        return [each for each in psutil.process_iter() if _runs(each, space, word)]

    def pid(self, node: str) -> int:
        """Returns this host's number of the node's first process."""
        (first,) = psutil.Process(self._init[node].pid).children()
        return int(first.pid)

    def start_node(self, node: str) -> None:
        """Boots a node."""
        (self._root / f"spool-{node}").mkdir(exist_ok=True)
        self._boot(node, [f"slurmd -D -N {node}"], self._wire_node)

    def kill_node(self, node: str) -> None:
        """Cuts a node's power: SIGKILL to PID 1, after which the kernel kills everything on the node."""
        unshare = self._init.pop(node)
        for first in psutil.Process(unshare.pid).children():
            first.kill()
        unshare.wait(30)

    def kill_slurmd(self, node: str) -> None:
        """Kills the daemon alone. The steps that it started live on."""
        found = self.processes(node, f"slurmd -D -N {node}")
        (daemon,) = [each for each in found if each.name() == "slurmd"]
        daemon.send_signal(signal.SIGKILL)

    def start_slurmd(self, node: str) -> None:
        """Starts the daemon again."""
        command = f"setsid slurmd -D -N {node} </dev/null >/dev/null 2>&1 &"
        assert self.run("bash", "-c", command, on=node).returncode == 0

    def logs(self) -> str:
        """Returns the end of every daemon's log."""
        return "\n".join(
            f"{path.name}: {path.read_text()[-800:]}" for path in sorted(self._root.glob("*.log"))
        )

    def _boot(self, node: str, daemons: Sequence[str], wire: Callable[[str], None]) -> None:
        spaces = ["--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        script = str(Path(__file__).with_name("node.sh"))
        with (self._root / f"init-{node}.log").open("a") as log:
            self._init[node] = subprocess.Popen(
                ["unshare", *spaces, script, node, str(self._root), *daemons],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env=self._environment, start_new_session=True,
            )  # fmt: skip
        stdin, stdout = self._init[node].stdin, self._init[node].stdout
        assert stdin and stdout
        assert stdout.readline() == "ready\n", self.logs()
        wire(node)
        stdin.write("\n")
        stdin.flush()

    def _wire_head(self, head: str) -> None:
        self._ip(head, "link", "add", "eth0", "type", "bridge")
        self._ip(head, "addr", "add", f"{SUBNET}.1/24", "dev", "eth0")
        self._ip(head, "link", "set", "eth0", "up")

    def _wire_node(self, node: str) -> None:
        peer, number = f"to-{node}", int(node.removeprefix("n"))
        # A node that was killed may leave its end of the cable for a moment.
        self._enter_network(HEAD, "ip", "link", "del", peer)
        end = ("type", "veth", "peer", "name", "eth0", "netns", str(self.pid(node)))
        self._ip(HEAD, "link", "add", peer, *end)
        self._ip(HEAD, "link", "set", peer, "master", "eth0", "up")
        self._ip(node, "addr", "add", f"{SUBNET}.{10 + number}/24", "dev", "eth0")
        self._ip(node, "link", "set", "eth0", "up")

    def _ip(self, node: str, *arguments: str) -> None:
        done = self._enter_network(node, "ip", *arguments)
        assert done.returncode == 0, done.stderr

    def _enter_network(self, node: str, *command: str) -> subprocess.CompletedProcess[str]:
        enter = ["nsenter", f"--target={self.pid(node)}", "--net", *command]
        return subprocess.run(enter, capture_output=True, text=True, timeout=30, check=False)

    def _idle(self) -> set[str]:
        listed = self.run("sinfo", "--noheader", "--Node", "--states=idle", "--format=%N").stdout
        return set(listed.split())


def _runs(process: psutil.Process, space: str, word: str) -> bool:
    try:
        here = os.readlink(f"/proc/{process.pid}/ns/pid") == space
        return here and word in " ".join(process.cmdline())
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError, PermissionError):
        return False


def wait_for(
    condition: Callable[[], bool], seconds: float, what: str, explain: Callable[[], str]
) -> None:
    """Polls until a condition holds. Fails with an explanation when the time is over."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}\n{explain()}"
        time.sleep(0.05)
