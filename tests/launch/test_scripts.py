"""The launch scripts by themselves: what shellcheck says, what they refuse, what they start."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(
    [*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/*.sbatch"), *ROOT.glob("tests/slurm/*.sh")]
)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="apt-get install shellcheck")
@pytest.mark.parametrize("script", [*SCRIPTS, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    found = subprocess.run(["shellcheck", script], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_there_are_scripts() -> None:
    names = {script.name for script in SCRIPTS}
    assert names == {"torchrun.sh", "chain.sh", "slurm.sbatch", "node.sh"}


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """Makes stand-ins for the programs that a script starts. Each prints its command line."""
    directory = tmp_path / "bin"
    directory.mkdir()
    for name in ("torchrun", "sbatch"):
        program = directory / name
        program.write_text(f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/calls; echo 41\n')
        program.chmod(0o755)
    return directory


def start(script: str, *arguments: str, commands: Path, **environment: str):
    path = f"{commands}:{os.environ['PATH']}"
    done = subprocess.run(
        [ROOT / "launch" / script, *arguments],
        env={"PATH": path, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    calls = commands.parent / "calls"
    return done, calls.read_text().splitlines() if calls.exists() else []


def test_torchrun_on_one_machine(commands: Path) -> None:
    done, (call,) = start("torchrun.sh", "4", "experiment=demo", commands=commands)
    assert done.returncode == 0
    assert call.startswith("torchrun --standalone --nproc-per-node 4 ")
    assert call.endswith("-m nvlm_train train experiment=demo")


def test_torchrun_on_several_machines(commands: Path) -> None:
    where = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "first"}
    _, (call,) = start("torchrun.sh", "8", "experiment=demo", commands=commands, **where)
    assert "--nnodes 2 --node-rank 1 --master-addr first --master-port 29500" in call


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["4"], {}, "OVERRIDES are missing"),
        (["four", "a=1"], {}, "NUM_PROCESSES=four is not a positive number"),
        (["4", "a=1"], {"NNODES": "2"}, "needs NODE_RANK on each machine"),
        (["4", "a=1"], {"NNODES": "2", "NODE_RANK": "0"}, "needs MASTER_ADDR"),
        (
            ["4", "a=1"],
            {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "localhost"},
            "needs MASTER_ADDR, the first machine's name",
        ),
    ],
)
def test_torchrun_says_what_is_missing(
    commands: Path, arguments: list[str], environment: dict[str, str], message: str
) -> None:
    done, calls = start("torchrun.sh", *arguments, commands=commands, **environment)
    assert done.returncode == 2 and calls == []
    assert message in done.stderr and "NUM_PROCESSES OVERRIDES" in done.stderr


def test_chain_queues_the_second_stage_behind_the_first(commands: Path) -> None:
    done, calls = start(
        "chain.sh", "--nodes=1", "pretrain", "--nodes=2", "pretrain,sft", "a=1", commands=commands
    )
    assert done.stdout == "41 41\n"
    script = ROOT / "launch" / "slurm.sbatch"
    assert calls == [
        f"sbatch --parsable --nodes=1 {script} a=1 schedule=[pretrain]",
        "sbatch --parsable --dependency=afterok:41 --kill-on-invalid-dep=yes --nodes=2 "
        f"{script} a=1 schedule=[pretrain,sft]",
    ]
