"""Writes what a GGUF file holds as a directory that save_pretrained might have written."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nvlm_train.convert.gguf.file import GgufFile, open_gguf
from nvlm_train.convert.gguf.model import Model, read_model, token_ids
from nvlm_train.convert.gguf.tokenizer import read_tokenizer, tokenizer_config
from nvlm_train.convert.gguf.weights import find_tensors, read_tensor
from nvlm_train.errors import CheckpointError

logger = logging.getLogger(__name__)

FILE_BYTES = 5_000_000_000
"""A safetensors file has at most so many bytes of tensors, or one tensor; so much is in memory at a time."""


def convert_gguf(path: Path, out: Path, tokenizer: Path | None = None) -> Model:
    """Writes config.json, safetensors in fp32, tokenizer.json, tokenizer_config.json, generation_config.json.

    Everything is written beside `out` first, so that an interrupted conversion leaves no half of one.

    Args:
        path: the .gguf file.
        out: a directory that is not there yet, or empty.
        tokenizer: the model's own tokenizer.json, to be copied; None for the vocabulary in the file.

    Returns:
        The model.

    Raises:
        CheckpointError: the file cannot be converted as a whole, or `out` holds something.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"out={out} is there already; remove it, or name another directory")
    if tokenizer is not None and not tokenizer.is_file():
        raise CheckpointError(f"--tokenizer={tokenizer}: no such file; give a tokenizer.json")
    file = open_gguf(path)
    model = read_model(file)
    tensors = find_tensors(file, model)
    aside = out.with_name(f"{out.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    if tokenizer is None:
        read_tokenizer(file).save(str(aside / "tokenizer.json"))
    else:
        shutil.copyfile(tokenizer, aside / "tokenizer.json")
    _write_json(aside / "tokenizer_config.json", tokenizer_config(file))
    ids = {f"{name}_token_id": number for name, number in token_ids(file).items()}
    _write_json(aside / "generation_config.json", ids)
    _write_json(aside / "config.json", model.config)
    _write_weights(file, model, tensors, aside)
    aside.replace(out)
    return model


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_weights(
    file: GgufFile, model: Model, tensors: Mapping[str, str], directory: Path
) -> None:
    """Writes one file, or several with their index."""
    from safetensors.numpy import save_file

    sizes = {name: 4 * math.prod(file.shape(stored)) for name, stored in tensors.items()}
    groups = _groups(sizes)
    names = _file_names(len(groups))
    for name, group in zip(names, groups, strict=True):
        logger.info("%s: %d tensors", name, len(group))
        arrays = {each: read_tensor(file, model, each, tensors[each]) for each in group}
        save_file(arrays, directory / name, metadata={"format": "pt"})
    if len(groups) > 1:
        places = {each: name for name, group in zip(names, groups, strict=True) for each in group}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        _write_json(directory / "model.safetensors.index.json", index)


def _groups(sizes: Mapping[str, int]) -> list[list[str]]:
    """Tensors, each group up to `FILE_BYTES`, in their order."""
    groups: list[list[str]] = []
    filled = FILE_BYTES
    for name, size in sizes.items():
        if not groups or filled + size > FILE_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def _file_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
