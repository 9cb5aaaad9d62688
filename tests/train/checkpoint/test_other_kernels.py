"""What one kernel library saved, another loads; and what cannot be read is an error of ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nvlm_train.config.schema import ParallelConfig
from tests.gpu.paths import HAS_ENGINE
from tests.train.checkpoint import other_kernels
from tests.workers import WorkerPool

LIBRARIES = ["torch", *(["transformer_engine"] if HAS_ENGINE else [])]


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
@pytest.mark.parametrize(("writer", "reader"), zip(LIBRARIES, LIBRARIES[::-1], strict=True))
def test_between_torch_and_transformer_engine(
    gpu: WorkerPool, tmp_path: Path, writer: str, reader: str
) -> None:
    """Weights are loaded bit for bit, and training goes on; without the library from torch to torch."""
    arguments = (writer, reader, ParallelConfig(), tmp_path / "saved")
    found, expected = gpu.run(1, other_kernels.across, *arguments)[0]
    assert found.keys() == expected.keys()
