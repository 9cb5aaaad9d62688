"""Ranks that are there, ranks that are not, ranks that stop half-way: real processes over real sockets."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nvlm_train.doctor.rendezvous import World, check_port

STOPS_AFTER_HELLO = """
import json, sys
from datetime import timedelta
from torch.distributed import PrefixStore, TCPStore
from nvlm_train.doctor.machine import versions
store = TCPStore("127.0.0.1", int(sys.argv[1]), timeout=timedelta(seconds=60), wait_for_workers=False)
here = {"host": "ghost", "versions": versions(), "device": "cpu"}
PrefixStore("nvlm_doctor", store).set("here/1", json.dumps(here))
sys.stdin.read()
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(rank: int, port: int) -> dict[str, str]:
    found = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {**os.environ, "OMP_NUM_THREADS": "1", **{key: str(each) for key, each in found.items()}}


def doctor(rank: int, port: int, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "nvlm_train", "doctor", "no=recipe", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, env=environment(rank, port), stdout=pipe, stderr=pipe, text=True
    )


def line(output: str, check: str) -> str:
    (found,) = (each for each in output.splitlines() if each[9:].startswith(check))
    return found


@contextmanager
def ended(*processes: subprocess.Popen[str]) -> Iterator[list[str]]:
    """Waits for processes, and leaves none behind. Returns what they printed."""
    try:
        yield [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_two_ranks_add_up_and_the_recipe_is_wrong() -> None:
    port = free_port()
    both = [doctor(rank, port) for rank in (0, 1)]
    with ended(*both) as (first, second):
        assert line(first, "ranks").startswith("ok") and "2 rank(s)" in line(first, "ranks")
        assert line(first, "all_reduce").startswith("ok")
        assert line(first, "clocks").startswith("ok")
        assert line(first, "recipe").startswith("error")
        assert second == ""
        assert [process.returncode for process in both] == [1, 0]


def test_a_rank_that_never_comes_is_named() -> None:
    with ended(doctor(0, free_port(), "--timeout", "1")) as (output,):
        assert "1 of 2 ranks are silent after 1 s: 1" in line(output, "ranks")


@pytest.mark.slow
def test_a_rank_that_stops_half_way_is_named_and_not_waited_for() -> None:
    port = free_port()
    ghost = subprocess.Popen(
        [sys.executable, "-c", STOPS_AFTER_HELLO, str(port)], stdin=subprocess.PIPE, text=True
    )
    with ended(doctor(0, port, "--timeout", "10")) as (output,):
        ghost.kill()
        ghost.wait()
        assert "rank 1 on ghost does not answer" in line(output, "clocks")
        assert "1 on ghost" in output.split("all_reduce")[1]


def test_rank_0_that_is_not_there() -> None:
    process = doctor(1, free_port(), "--timeout", "1")
    with ended(process) as (output,):
        assert line(output, "rendezvous").startswith("error")
        assert process.returncode == 1


def test_ports() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (found,) = check_port(World(0, 2, "127.0.0.1", port))
        assert found.level == "error" and "ss -ltnp" in found.remedy
        (found,) = check_port(World(1, 2, "127.0.0.1", port))
        assert found.level == "ok", "rank 1 does not listen"
    (found,) = check_port(World(0, 2, "no-such-host.invalid", port))
    assert found.level == "error" and "does not resolve" in found.text


@pytest.mark.slow
def test_under_torchrun(recipe_arguments: list[str], tmp_path: Path) -> None:
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "nvlm_train"]
    written = tmp_path / "found.json"
    command = [*launch, "doctor", *recipe_arguments, "--json", str(written)]
    subprocess.run([sys.executable, "-m", *command], check=True, timeout=200)
    found = json.loads(written.read_text())
    assert found["errors"] == 0
    assert "all_reduce" in [each["check"] for each in found["findings"]]
