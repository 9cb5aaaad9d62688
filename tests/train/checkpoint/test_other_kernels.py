"""What one kernel library saved, another loads; and what cannot be read is an error of ours."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nvlm_train.config.schema import ParallelConfig
from tests.train.checkpoint import other_kernels
from tests.workers import WorkerPool


@pytest.mark.parametrize(
    ("writer", "reader", "world", "parallel"),
    [
        ("other", "other", 1, ParallelConfig()),
        ("own", "other", 2, ParallelConfig(pipeline=2)),
        pytest.param("other", "own", 2, ParallelConfig(pipeline=2), marks=pytest.mark.slow),
    ],
)
def test_checkpoints_do_not_depend_on_the_kernels(
    workers: WorkerPool,
    tmp_path: Path,
    writer: str,
    reader: str,
    world: int,
    parallel: ParallelConfig,
) -> None:
    arguments = (writer, reader, parallel, tmp_path / "saved")
    found, expected = workers.run(world, other_kernels.across, *arguments)[0]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_stand_in_stands_where_norms_do(workers: WorkerPool) -> None:
    assert workers.run(1, other_kernels.number_of_states, "other")[0] == 4 * 2 + 1
    assert workers.run(1, other_kernels.number_of_states, "own")[0] == 0


def test_torchs_exception_is_ours(workers: WorkerPool, tmp_path: Path) -> None:
    """It derives from BaseException, so no `except Exception` sees it."""
    message = workers.run(1, other_kernels.load_without_a_shard, tmp_path / "saved")[0]
    assert message.startswith(f"{tmp_path / 'saved'} cannot be read: rank 0: ")


@pytest.mark.gpu
def test_between_torch_and_transformer_engine(tmp_path: Path) -> None:
    """The library itself runs in a process with NCCL."""
    assert importlib.util.find_spec("transformer_engine") is not None, "install nvlm-train[gpu]"
    command = [sys.executable, "-m", "tests.train.checkpoint.other_kernels", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
