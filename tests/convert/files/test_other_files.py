"""Directories without safetensors are refused with the reason, and nothing in them is opened."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nvlm_train.convert.headers import read_headers
from nvlm_train.convert.reader import language_source
from nvlm_train.errors import CheckpointError
from tests.parity.recipes import LANGUAGE


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    ("names", "reason", "remedy"),
    [
        (("pytorch_model.bin",), "but pytorch_model.bin: pickled", "save_pretrained(ANOTHER)"),
        (("model.pt",), "but model.pt: pickled weights are not read: opening", "safetensors"),
        (("a.bin", "b.bin", "c.bin"), "but a.bin and 2 more: pickled", "safetensors"),
        (("consolidated.00.pth",), "but consolidated.00.pth: pickled", "safetensors"),
        (("tf_model.h5",), "but tf_model.h5: weights of TensorFlow", "save_pretrained(ANOTHER)"),
        (("model-q8_0.gguf",), "but model-q8_0.gguf: a GGUF file", "nvlm convert gguf"),
        (("config.json",), "no *.safetensors there; give a directory", "save_pretrained wrote"),
    ],
)
def test_other_weights_are_named(
    tmp_path: Path, names: tuple[str, ...], reason: str, remedy: str
) -> None:
    for name in names:
        (tmp_path / name).write_bytes(pickle.dumps(Trap(tmp_path / "opened")))
    with (
        pytest.raises(CheckpointError) as caught,
        language_source(replace(LANGUAGE, weights=str(tmp_path))),
    ):
        pass
    message = str(caught.value)
    assert f"model.language.weights={tmp_path}: no *.safetensors there" in message
    assert reason in message and remedy in message
    assert not (tmp_path / "opened").exists()


def test_pickles_beside_safetensors_are_passed_over(tmp_path: Path) -> None:
    """Repositories often have both."""
    save_file({"table": torch.zeros(2, 3)}, tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "opened")))
    found = read_headers(tmp_path, "weights")
    assert not found.problems and found.tensors.keys() == {"table"}
    assert not (tmp_path / "opened").exists()


def test_two_checkpoints_in_one_directory_are_one_problem(tmp_path: Path) -> None:
    """A line for two files, however many tensors they share."""
    tensors = {f"layers.{number}.weight": torch.zeros(2) for number in range(20)}
    for name in ("a.safetensors", "b.safetensors"):
        save_file(tensors, tmp_path / name)
    (problem,) = read_headers(tmp_path, "weights").problems
    assert "layers.0.weight is in two files, a.safetensors and b.safetensors (19 more)" in str(
        problem
    )
