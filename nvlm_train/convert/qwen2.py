"""Reads a Qwen2 checkpoint of Hugging Face into any layout, one tensor at a time, from safetensors only."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from nvlm_train.config.model_schema import LanguageConfig
from nvlm_train.convert.tables import find_row
from nvlm_train.errors import CheckpointError

_CONFIG_FIELDS = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "intermediate_size": "ffn_hidden_size",
    "rms_norm_eps": "norm_eps",
}
"""Field of a Hugging Face Qwen2 config -> field of LanguageConfig."""


def qwen2_source(language: LanguageConfig) -> Callable[[str, tuple[int, ...]], Tensor | None]:
    """A source for `model.canonical.fill`: language-model tensors of `language.weights`, None for others.

    Raises:
        CheckpointError: the directory lacks files or tensors, or its config contradicts the recipe.
    """
    directory = Path(language.weights or "")
    files = _files_by_tensor(directory)
    _check_config(language, directory / "config.json")

    def source(name: str, shape: tuple[int, ...]) -> Tensor | None:
        found = find_row(name)
        if found is None:
            return None
        row, parts = found
        missing = [part for part in parts if part not in files]
        if missing:
            raise CheckpointError(
                f"model.language.weights={directory}: no tensor named {missing[0]}"
            )
        tensor = row.join(language, [_read(files[part], part) for part in parts])
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"model.language.weights={directory}: {parts[0]} gives {tuple(tensor.shape)} for {name}, "
                f"the recipe's model has {shape}; correct the sizes in model.language"
            )
        return tensor

    return source


def _files_by_tensor(directory: Path) -> dict[str, Path]:
    from safetensors import safe_open

    files: dict[str, Path] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as handle:
            files |= dict.fromkeys(handle.keys(), path)
    if not files:
        raise CheckpointError(
            f"model.language.weights={directory}: no *.safetensors there; give a directory that "
            "save_pretrained of a Qwen2 model wrote (pickled weights are not read)"
        )
    return files


def _read(path: Path, name: str) -> Tensor:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as handle:
        return handle.get_tensor(name)


def _check_config(language: LanguageConfig, path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(
            f"model.language.weights={path.parent}: no config.json there, so its sizes cannot be checked; "
            "add the one that save_pretrained wrote"
        )
    stored = json.loads(path.read_text())
    if stored.get("tie_word_embeddings"):
        raise CheckpointError(
            f"{path}: tie_word_embeddings=true; NVLM's language models have an output table of their own"
        )
    theta = stored.get("rope_theta") or stored.get("rope_parameters", {}).get("rope_theta")
    pairs = [(theirs, stored.get(theirs), ours) for theirs, ours in _CONFIG_FIELDS.items()]
    pairs.append(("rope_theta", theta, "rope_theta"))
    wrong = [
        f"model.language.{ours}={getattr(language, ours)} but {path} has {theirs}={value}"
        for theirs, value, ours in pairs
        if value != getattr(language, ours)
    ]
    if wrong:
        raise CheckpointError("; ".join(wrong))
