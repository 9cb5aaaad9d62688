"""Reads a language model of Hugging Face into any layout, one tensor at a time, from safetensors only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from nvlm_train.config.schema import LanguageConfig
from nvlm_train.convert.headers import read_headers
from nvlm_train.convert.language import language_problems
from nvlm_train.convert.names import find_row
from nvlm_train.convert.problem import refuse


def language_source(language: LanguageConfig) -> Callable[[str, tuple[int, ...]], Tensor | None]:
    """Makes a source for `model.global_weights.fill` of the tensors in `language.weights`.

    The source maps a global name and shape to the whole tensor, and names of other parts to None.

    Raises:
        CheckpointError: the directory is not whole, or holds another model than the recipe describes.
    """
    directory = Path(language.weights or "")
    refuse(language_problems(language, {}))
    stored = read_headers(directory, str(directory)).tensors

    def source(name: str, shape: tuple[int, ...]) -> Tensor | None:
        found = find_row(name)
        if found is None:
            return None
        row, parts = found
        tensor = row.join(language, [_read(stored[part].path, part) for part in parts])
        assert tuple(tensor.shape) == shape, f"{name}: {parts} give {tuple(tensor.shape)}"
        return tensor

    return source


def _read(path: Path, name: str) -> Tensor:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as handle:
        tensor: Tensor = handle.get_tensor(name)
    return tensor
