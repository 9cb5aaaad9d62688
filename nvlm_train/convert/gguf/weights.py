"""A GGUF file's tensors under Hugging Face's names, one at a time."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from nvlm_train.convert.gguf.file import GgufFile
from nvlm_train.convert.gguf.model import ROPE_FACTORS, Model
from nvlm_train.convert.language import FAMILIES
from nvlm_train.convert.problem import Problems, error, refuse


def find_tensors(file: GgufFile, model: Model) -> dict[str, str]:
    """Hugging Face's name of every tensor that the model has, to the file's.

    Raises:
        CheckpointError: one is missing, has another shape than the metadata say, or has no place.
    """
    wanted = FAMILIES[model.architecture.model_type].shapes(model.language)
    found = {name: _stored_name(name, file, model) for name in wanted}
    refuse(_problems(file, wanted, found))
    return found


def _stored_name(name: str, file: GgufFile, model: Model) -> str:
    from gguf import MODEL_ARCH, get_tensor_name_map

    architecture = MODEL_ARCH[file.architecture.upper()]
    names = get_tensor_name_map(architecture, model.language.num_layers)
    stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
    assert stored is not None, f"{name}: the library knows no name for it"
    return str(stored)


def _problems(
    file: GgufFile, wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, str]
) -> Problems:
    missing = [name for name in found.values() if name not in file.tensors]
    if missing:
        yield error(
            f"{file.path} lacks {len(missing)} tensors, {missing[0]} first", "fetch it again"
        )
    for name in file.tensors.keys() - set(found.values()) - {ROPE_FACTORS}:
        yield error(
            f"{file.path} has a tensor {name}, which {file.architecture} as its metadata describe it does "
            "not have, so that what it does would be left out",
            "give a file of such a model, or the original weights",
        )
    for name, stored in found.items():
        if stored in file.tensors and file.shape(stored) != wanted[name]:
            yield error(
                f"{file.path}: {stored} has the shape {file.shape(stored)}, its metadata say {wanted[name]}",
                "fetch it again",
            )


def read_tensor(file: GgufFile, model: Model, name: str, stored: str) -> np.ndarray:
    """A tensor [out, in] or [out] in fp32, with rows in transformers' order.

    Args:
        file: the file.
        model: its model.
        name: Hugging Face's name.
        stored: the file's.
    """
    values = file.values(stored)
    if model.architecture.interleaves and ".self_attn.q_proj." in name:
        return _halves(values, model.language.num_heads)
    if model.architecture.interleaves and ".self_attn.k_proj." in name:
        return _halves(values, model.language.num_kv_heads)
    return values


def _halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Pairs (0, half, 1, half + 1, ...) of each head's rows back to both halves, one behind the other."""
    pairs = rows.reshape(heads, len(rows) // heads // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)
