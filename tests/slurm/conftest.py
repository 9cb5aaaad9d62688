"""One cluster and one uninterrupted run for all tests of this directory."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing
from tests.slurm.jobs import ENVIRONMENT, PATIENCE_S, smoke_arguments
from tests.train.smoke import make_smoke_data


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Starts two nodes, n1 and n2."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    # The path of a Unix socket may have 107 characters, and pytest's directories are long.
    parent = Path(tempfile.mkdtemp(prefix="nvlm-slurm-"))
    up = Cluster(parent / "cluster")
    try:
        up.start()
        yield up
    finally:
        up.stop()
        shutil.rmtree(parent)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes tokenizer, shards and blend, on the shared file system."""
    root = tmp_path_factory.mktemp("slurm") / "data"
    make_smoke_data(root)
    return root


@pytest.fixture(scope="session")
def whole(cluster: Cluster, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes an uninterrupted run: launch/torchrun.sh on both machines, without SLURM."""
    run_dir = tmp_path_factory.mktemp("slurm") / "whole"
    command = ["launch/torchrun.sh", "2", *smoke_arguments(data, run_dir)]
    parts = [
        subprocess.Popen(
            [*cluster.enter(node), *command],
            env={
                **os.environ, **ENVIRONMENT,
                "NNODES": "2", "NODE_RANK": str(number), "MASTER_ADDR": cluster.nodes[0],
            },
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for number, node in enumerate(cluster.nodes)
    ]  # fmt: skip
    outputs = [part.communicate(timeout=PATIENCE_S)[0] for part in parts]
    assert [part.returncode for part in parts] == [0, 0], "\n".join(outputs)[-8000:]
    return run_dir
