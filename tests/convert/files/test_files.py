"""Files of weights: an index that lies, tensors twice, cut files, quantised tensors, adapters."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nvlm_train.convert.families.qwen2 import QWEN2
from nvlm_train.convert.headers import INDEX
from nvlm_train.convert.language import language_problems
from nvlm_train.convert.names import ROWS
from tests.convert.files.models import LANGUAGE

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def problems(directory: Path, level: str = "error", **changes: Any) -> str:
    language = replace(LANGUAGE, weights=str(directory), **changes)
    return "\n".join(str(each) for each in language_problems(language, {}) if each.level == level)


@pytest.fixture
def whole(qwen2_files: Path, tmp_path: Path) -> Path:
    """One file, to break."""
    return shutil.copytree(qwen2_files, tmp_path / "whole")


@pytest.fixture
def sharded(qwen2_files: Path, tmp_path: Path) -> Path:
    """Two files and an index, to break."""
    state = load_file(qwen2_files / "model.safetensors")
    directory = tmp_path / "sharded"
    directory.mkdir()
    shutil.copy(qwen2_files / "config.json", directory)
    files = {
        name: f"model-0000{1 + number % 2}-of-00002.safetensors"
        for number, name in enumerate(state)
    }
    for file in set(files.values()):
        save_file({name: state[name] for name in files if files[name] == file}, directory / file)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return directory


def change(path: Path, **tensors: torch.Tensor | None) -> None:
    """Tensors written over, or removed where None."""
    state = load_file(path) | {name: each for name, each in tensors.items() if each is not None}
    save_file({name: state[name] for name in state if tensors.get(name, 0) is not None}, path)


def test_whole_and_sharded_weights_are_accepted(whole: Path, sharded: Path) -> None:
    assert problems(whole) == problems(sharded) == ""
    assert problems(whole, "warning") == ""


def test_the_table_lists_the_tensors_that_are_read() -> None:
    assert set(QWEN2.tensors) == {part for row in ROWS for part in row.parts}


def test_angles_that_are_computed_again_are_known(whole: Path) -> None:
    stored = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    change(whole / "model.safetensors", **stored)
    assert problems(whole) == ""
    change(whole / "model.safetensors", **{"model.layers.0.self_attn.other": torch.zeros(4)})
    assert "unexpected=['model.layers.0.self_attn.other'], 1 in all" in problems(whole)


def test_a_file_that_the_index_names_is_missing(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    (problem,) = problems(sharded).splitlines()
    assert "names model-00002-of-00002.safetensors, which is not there" in problem


def test_a_tensor_in_two_files(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))
    name = next(iter(load_file(first)))
    change(second, **{name: load_file(first)[name]})
    assert f"{name} is in two files, {first.name} and {second.name}" in problems(sharded)


def test_a_file_that_the_index_does_not_name(sharded: Path) -> None:
    save_file({"extra": torch.zeros(1)}, sharded / "others.safetensors")
    found = problems(sharded)
    assert "others.safetensors is there, but" in found and "unexpected=['extra']" in found


def test_an_index_that_places_a_tensor_elsewhere(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"][Q_PROJ] = {
        "model-00001-of-00002.safetensors": "model-00002-of-00002.safetensors",
        "model-00002-of-00002.safetensors": "model-00001-of-00002.safetensors",
    }[index["weight_map"][Q_PROJ]]
    (sharded / INDEX).write_text(json.dumps(index))
    assert f"no tensor named {Q_PROJ} in model-0000" in problems(sharded)
    (sharded / INDEX).write_text("{")
    assert f"{INDEX} cannot be read" in problems(sharded)


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_cut_file_is_named(whole: Path, size: int) -> None:
    path = whole / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    (problem,) = problems(whole).splitlines()
    assert "model.safetensors is not a whole safetensors file" in problem


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.int8, "I8"),
        (torch.uint8, "U8"),
        (torch.int32, "I32"),
    ],
)
def test_quantised_tensors_are_named(whole: Path, dtype: torch.dtype, name: str) -> None:
    path = whole / "model.safetensors"
    change(path, **{Q_PROJ: load_file(path)[Q_PROJ].to(dtype)})
    assert f"{Q_PROJ} has dtype={name}" in problems(whole)


def test_a_dtype_that_the_tensors_do_not_have_is_a_warning(whole: Path) -> None:
    path = whole / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "bfloat16"}))
    assert problems(whole) == ""
    assert "dtype=bfloat16, the tensors are float32" in problems(whole, "warning")


def test_an_adapter_is_named(whole: Path) -> None:
    (whole / "adapter_config.json").write_text("{}")
    assert "an adapter lies there" in problems(whole)


def test_tables_of_another_height(whole: Path) -> None:
    assert problems(whole, vocab_size=96) == "", "the recipe may pad"
    assert "gives (64, 32)" in problems(whole, vocab_size=48)
    change(whole / "model.safetensors", **{"lm_head.weight": torch.zeros(60, 32)})
    assert "vocab_size=64, but lm_head.weight has 60 rows" in problems(whole)
    change(whole / "model.safetensors", **{"lm_head.weight": None})
    assert "no tensor named lm_head.weight" in problems(whole)


def test_a_shape_that_differs(whole: Path) -> None:
    change(whole / "model.safetensors", **{Q_PROJ: torch.zeros(32, 16)})
    assert f"{Q_PROJ} gives (32, 16)" in problems(whole)
    change(whole / "model.safetensors", **{Q_PROJ: torch.zeros(32)})
    assert f"{Q_PROJ} gives (32,)" in problems(whole)


def test_no_torch_is_needed(whole: Path) -> None:
    import subprocess
    import sys

    program = (
        "import sys; from dataclasses import replace;"
        "from nvlm_train.config.model_schema import LanguageConfig;"
        "from nvlm_train.convert.language import language_problems;"
        "assert list(language_problems(LanguageConfig(1, 4, 1, 1, 4, 8, weights=sys.argv[1]), {}));"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, str(whole)], check=True, timeout=100)
