"""A digest of the frozen encoder's weights. They are in no checkpoint: a run remembers which they were."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from nvlm_train.config.model_schema import VisionConfig
from nvlm_train.convert.headers import Stored, read_headers
from nvlm_train.convert.problem import refuse
from nvlm_train.convert.whole.parts import own_tensors

_THREADS = 8
"""SHA-256 takes 0.5 to 2 GB/s of a core: 3 to 12 GB a second, for the 11.1 GB of InternViT-6B in bf16."""


def encoder_digest(config: VisionConfig, seed: int) -> str:
    """The digest is another one for any other tensor, and the same for every rank, layout and precision.

    Weights of files: SHA-256 over name, dtype, shape and bytes of every tensor of the encoder as it is
    stored, in order of names, so that order, metadata and the split into files do not count. Random
    weights: `seed=N`. They follow from it and from sizes that the resume check compares; their bytes do
    not decide, because torch's normal distribution rounds differently on CPUs with other vector units.

    Args:
        config: says where the weights lie.
        seed: the recipe's.

    Raises:
        CheckpointError: the files are missing or damaged.
    """
    if config.weights is None:
        return f"seed={seed}"
    setting = f"model.vision.weights={config.weights}"
    headers = read_headers(Path(config.weights), setting)
    refuse(headers.problems)
    # Of a whole model, only what is read.
    tensors = own_tensors("vision", headers).items()
    with ThreadPoolExecutor(_THREADS) as threads:
        digests = list(threads.map(_digest_of, tensors))
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()


def _digest_of(tensor: tuple[str, Stored]) -> str:
    """Name, dtype, shape and SHA-256 of the bytes of one tensor, as text."""
    from safetensors import safe_open

    name, stored = tensor
    with safe_open(stored.path, framework="pt") as opened:
        content = opened.get_tensor(stored.prefix + name)
    plain = content.contiguous().reshape(-1).view(torch.uint8).numpy()
    what = [name, str(content.dtype), list(content.shape), hashlib.sha256(plain).hexdigest()]
    return json.dumps(what)
