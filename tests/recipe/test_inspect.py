"""`nvlm convert inspect`: what a directory is, what fits, what does not and why."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nvlm_train.cli import main
from tests.recipe.test_from import write_encoder, write_language


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_language(tmp_path_factory.mktemp("inspected") / "qwen2", "qwen2")


def altered(directory: Path, tmp_path: Path, **changes: Any) -> Path:
    copy = tmp_path / "altered"
    copy.mkdir()
    (copy / "model.safetensors").symlink_to(directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text()) | changes
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def said(directory: Path, capsys: pytest.CaptureFixture[str], code: int) -> str:
    assert main(["convert", "inspect", str(directory)]) == code
    captured = capsys.readouterr()
    return captured.out + captured.err


def test_a_language_model_that_fits(qwen2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = said(qwen2, capsys, 0)
    assert "model.language: model_type=qwen2" in output
    assert "num_layers=4 hidden_size=64 num_heads=4 num_kv_heads=2" in output
    assert "parallel.tensor 1 or 2" in output and "parallel.pipeline 1, 2 or 4" in output
    assert "2 does not divide its 641 rows; for all of these `from` pads them to 704" in output
    assert f"model.language.from={qwen2}" in output


def test_an_encoder_that_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = said(write_encoder(tmp_path / "encoder", "intern_vit_300m"), capsys, 0)
    assert "kind=intern_vit_300m" in output and "4 tokens each" in output
    assert "fits: every key" in output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"num_hidden_layers": 3}, "unexpected=['model.layers.3."),
        ({"num_attention_heads": 3}, "model.language.num_heads=3 does not divide"),
        ({"num_hidden_layers": 10**12}, "num_layers=1000000000000 is out of range"),
        ({"rms_norm_eps": -1}, "model.language.norm_eps=-1.0 is out of range"),
        ({"hidden_size": "wide"}, "model.language.hidden_size=wide (str) has the wrong type"),
        ({"num_hidden_layers": 10**7}, "num_layers=10000000 is out of range; use from 1 to 10000"),
        ({"hidden_size": 10**14 + 1}, "num_heads=4 does not divide model.language.hidden_size"),
        ({"rms_norm_eps": -1.0}, "model.language.norm_eps=-1.0 is out of range"),
        ({"model_type": "siglip2_vision_model"}, "stretches its positions to images of any shape"),
        ({"model_type": ["qwen2"]}, 'model_type=["qwen2"], which is read neither'),
        (
            {"model_type": "gemma"},
            "model_type=gemma, which is read neither as a language model nor",
        ),
    ],
)
def test_what_does_not_fit_is_said_with_the_reason(
    qwen2: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    message: str,
) -> None:
    code = 2 if "model_type" in changes else 1
    output = said(altered(qwen2, tmp_path, **changes), capsys, code)
    assert message in output and "fits: every key" not in output


def test_a_directory_without_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no config.json there" in said(tmp_path, capsys, 2)


def test_it_loads_no_torch(qwen2: Path) -> None:
    code = (
        "import sys; from nvlm_train.cli import main; code = main(sys.argv[1:]);"
        "assert not {'torch', 'megatron'} & sys.modules.keys(); sys.exit(code)"
    )
    arguments = ["convert", "inspect", str(qwen2)]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)
