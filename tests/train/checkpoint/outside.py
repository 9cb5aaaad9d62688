"""A smoke run with an encoder and a tokenizer of its own files, and what changes them under their names."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from nvlm_train.config.model_schema import VisionConfig
from nvlm_train.errors import CheckpointError
from nvlm_train.train.checkpoint import outside
from nvlm_train.train.checkpoint.manifest import (
    Manifest,
    digest_file,
    read_manifest,
    write_manifest,
)
from nvlm_train.train.checkpoint.outside import digests_outside
from nvlm_train.train.checkpoint.run_state import FILE_NAME
from nvlm_train.train.start import trained_replica
from tests.hugging_face import encoder_sizes
from tests.train import runs
from tests.train.smoke import smoke_recipe


def overrides(files: Path) -> list[str]:
    """Returns overrides of a smoke run that reads encoder and tokenizer from here."""
    return [
        f"model.vision.weights={files}/encoder",
        f"model.tokenizer.path={files}/tokenizer.json",
    ]


def make_files(files: Path, data: Path, vision: VisionConfig) -> None:
    """Writes an encoder as transformers saves it, and the smoke data's tokenizer."""
    from transformers.models.internvl.configuration_internvl import InternVLVisionConfig
    from transformers.models.internvl.modeling_internvl import InternVLVisionModel

    config = InternVLVisionConfig(**encoder_sizes(vision))
    InternVLVisionModel(config).save_pretrained(files / "encoder")
    shutil.copy(data / "tokenizer.json", files)


def turn_a_sign(files: Path) -> None:
    """Changes a sign in one tensor. The sum of magnitudes stays the same."""
    path = files / "encoder" / "model.safetensors"
    state = load_file(path)
    state["encoder.layer.0.mlp.fc1.weight"] *= -1
    save_file(state, path, {"format": "pt"})


def exchange_words(files: Path) -> None:
    """Exchanges the ids of two letters. Every sample keeps its number of tokens."""
    path = files / "tokenizer.json"
    content = json.loads(path.read_text())
    words = content["model"]["vocab"]
    words["r"], words["t"] = words["t"], words["r"]
    path.write_text(json.dumps(content))


CHANGES: dict[str, Callable[[Path], None]] = {
    "model.vision.weights": turn_a_sign,
    "model.tokenizer.path": exchange_words,
}


def forget(checkpoint: Path) -> None:
    """Makes a checkpoint what one of an older version is: nothing is said of these files."""
    state = json.loads((checkpoint / FILE_NAME).read_text())
    del state["outside"]
    (checkpoint / FILE_NAME).write_text(json.dumps(state))
    manifest = read_manifest(checkpoint)
    files = {**manifest.files, FILE_NAME: digest_file(checkpoint / FILE_NAME)}
    write_manifest(Manifest(manifest.sequence, files), checkpoint)


def refusal(data: Path, run_dir: Path, files: Path) -> str:
    """Runs on the workers: why training does not go on."""
    with pytest.raises(CheckpointError) as caught:
        runs.run(data, run_dir, *overrides(files))
    return str(caught.value)


def refusal_to_answer(data: Path, run_dir: Path, files: Path) -> str:
    """Runs on the workers: why the trained model is not asked."""
    with pytest.raises(CheckpointError) as caught:
        trained_replica(smoke_recipe(data, run_dir, *overrides(files)), "sft")
    return str(caught.value)


def warnings_of_run(data: Path, run_dir: Path, files: Path) -> list[str]:
    """Runs on the workers: a run, and what this rank said about these files."""
    said: list[str] = []

    def keep(text: str, *parts: object) -> None:
        said.append(text % parts)

    with mock.patch.object(logging.getLogger(outside.__name__), "warning", keep):
        assert runs.run(data, run_dir, *overrides(files)) == 0
    return said


def digests_of_nodes(data: Path, roots: list[Path]) -> dict[str, str] | str:
    """Runs on the workers, a node each with files of its own: what they agree on, or why they do not."""
    recipe = smoke_recipe(data, data, *overrides(roots[dist.get_rank()]))
    try:
        return digests_outside(recipe)
    except CheckpointError as error:
        return str(error)
