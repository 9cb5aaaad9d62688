"""Slices of tensors out of several safetensors files, how much was asked for, and what stays in memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nvlm_train.convert import weight_files
from nvlm_train.convert.headers import read_headers
from nvlm_train.convert.weight_files import WeightFiles
from nvlm_train.errors import CheckpointError

STATE = {
    "first.weight": torch.randn(40, 24),
    "first.bias": torch.randn(40).bfloat16(),
    "second.weight": torch.randn(6, 4, 3, 3).double(),
    "second.scale": torch.tensor(2.5),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files")
    for part in ("first", "second"):
        tensors = {name: tensor for name, tensor in STATE.items() if name.startswith(part)}
        save_file(tensors, path / f"{part}.safetensors")
    return path


def opened(directory: Path) -> WeightFiles:
    return WeightFiles(read_headers(directory, "weights").tensors, "weights")


@pytest.mark.parametrize("piece", [32 << 20, 400, 1])
def test_slices_are_those_of_the_tensors(
    directory: Path, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_files, "PIECE", piece)
    wanted: list[tuple[str, tuple[slice, ...]]] = [
        ("first.weight", ()),
        ("first.weight", (slice(10, 33),)),
        ("first.weight", (slice(0, 40), slice(8, 16))),
        ("first.weight", (slice(4, 4),)),
        ("first.bias", (slice(39, 40),)),
        ("second.weight", (slice(1, 5), slice(0, 4), slice(1, 2))),
        ("second.scale", ()),
    ]
    asked = 0
    with opened(directory) as files:
        for name, index in wanted:
            found, expected = files.read(name, index), STATE[name][index]
            assert found.dtype == expected.dtype and torch.equal(found, expected)
            asked += expected.nbytes
            assert files.bytes_asked == asked
    assert all(torch.equal(opened(directory).read(name), STATE[name]) for name in STATE)


def test_a_slice_is_cast_into_what_is_there(directory: Path) -> None:
    into = torch.zeros(3, 24, dtype=torch.bfloat16)
    with opened(directory) as files:
        files.copy_into(into, "first.weight", (slice(2, 5),))
    assert torch.equal(into, STATE["first.weight"][2:5].bfloat16())


def test_a_file_is_opened_once_and_only_when_needed(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors

    files, paths, original = opened(directory), [], safetensors.safe_open

    def counted(path: Path, **options: str) -> object:
        paths.append(Path(path).name)
        return original(path, **options)

    monkeypatch.setattr(safetensors, "safe_open", counted)
    with files:
        for name in ("first.weight", "first.bias", "first.weight"):
            files.read(name)
        assert paths == ["first.safetensors"] and files.files_opened == 1
        files.read("second.scale")
        assert paths == ["first.safetensors", "second.safetensors"] and files.files_opened == 2
    assert files.files_opened == 0


def test_progress_is_said_now_and_then(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not a line for each tensor; the last one says how long it took."""
    now = [0.0]
    monkeypatch.setattr(weight_files.time, "monotonic", lambda: now[0])
    with caplog.at_level("INFO", "nvlm_train"), opened(directory) as files:
        files.bytes_expected = 3 * files.bytes_of("first.weight")
        for seconds in (0.0, 4.0, 12.0, 13.0):
            now[0] = seconds
            files.read("first.weight", (slice(0, 20),))
    assert [record.getMessage() for record in caplog.records] == [
        "weights: read 0.00 GB of 0.00 GB, 1 of 2 files opened",
        "weights: read 0.00 GB of 0.00 GB, 1 of 2 files opened in 13.0 s",
    ]


def test_a_file_that_went_is_named(directory: Path, tmp_path: Path) -> None:
    path = tmp_path / "gone.safetensors"
    path.write_bytes((directory / "first.safetensors").read_bytes())
    files = opened(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"gone.safetensors: first.bias cannot be read: .*"):
        files.read("first.bias")


RESIDENT = """
import sys, torch
from pathlib import Path
from nvlm_train.convert import weight_files
from nvlm_train.convert.headers import read_headers

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))

weight_files.PIECE = 4 << 20
files = weight_files.WeightFiles(read_headers(Path(sys.argv[1]), "weights").tensors)
rows = slice(0, 16384)
files.read("table", (slice(0, 8), slice(0, 8)))
before = peak()
with files:
    kept = [files.read("table", (rows, slice(first, first + 512))) for first in (0, 512)]
print((peak() - before) / sum(each.nbytes for each in kept))
"""


def test_what_was_read_does_not_stay_mapped(tmp_path: Path) -> None:
    """A process has what it keeps and a piece in memory, not the file's pages too."""
    # A link to a blob, as the hub's cache has it.
    save_file({"table": torch.ones(16384, 1024)}, tmp_path / "blob")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blob")
    run = subprocess.run(
        [sys.executable, "-c", RESIDENT, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert 0.9 < float(run.stdout) < 1.2


def test_memory_that_is_not_the_files_is_left_alone(directory: Path) -> None:
    """The control of what lets pages go: elsewhere they would lose their values."""
    other = torch.arange(1 << 16)
    with opened(directory) as files:
        files.read("first.weight")
        files._open[directory / "first.safetensors"].let_go(other)
    assert torch.equal(other, torch.arange(1 << 16))
