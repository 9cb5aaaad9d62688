"""A digest of the frozen encoder's weights. They are in no checkpoint: a run remembers which they were."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from nvlm_train.config.schema import VisionConfig
from nvlm_train.convert.vision import PREFIX
from nvlm_train.errors import CheckpointError

_THREADS = 8
"""SHA-256 takes 0.5 to 2 GB/s of a core: 3 to 12 GB a second, for the 11.1 GB of InternViT-6B in bf16."""


def encoder_digest(config: VisionConfig, seed: int) -> str:
    """The digest is another one for any other tensor, and the same for every rank, layout and precision.

    Weights of files: SHA-256 over every tensor's name, dtype, shape and bytes as they are stored, in order
    of names, so that order, metadata and the split into files do not count. Random weights: `seed=N`. They
    follow from it and from sizes that the resume check compares; their bytes do not decide, because
    torch's normal distribution rounds differently on CPUs with other vector units.

    Args:
        config: says where the weights lie.
        seed: the recipe's.

    Raises:
        CheckpointError: the files are missing or damaged.
    """
    if config.weights is None:
        return f"seed={seed}"
    directory = Path(config.weights)
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"model.vision.weights={directory}: no model.safetensors there; "
            "give the directory that save_pretrained of an InternVL vision model wrote"
        )
    places = [(file, name) for file in files for name in _names(file)]
    with ThreadPoolExecutor(_THREADS) as threads:
        digests = list(threads.map(_digest_of, places))
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()


def _names(file: Path) -> Sequence[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            names: list[str] = opened.keys()
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged: {error}; copy it anew") from error
    return names


def _digest_of(place: tuple[Path, str]) -> str:
    """Name, dtype, shape and SHA-256 of the bytes of one tensor, as text."""
    from safetensors import safe_open

    file, name = place
    with safe_open(file, framework="pt") as opened:
        tensor = opened.get_tensor(name)
    content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    what = [
        # As build.py reads it.
        name.removeprefix(PREFIX),
        str(tensor.dtype),
        list(tensor.shape),
        hashlib.sha256(content).hexdigest(),
    ]
    return json.dumps(what)
