"""One GGUF file: its metadata as plain values, and its tensors, dequantised one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nvlm_train.errors import CheckpointError

if TYPE_CHECKING:
    from gguf import ReaderTensor

_AGAIN = "fetch it again"


@dataclass(frozen=True)
class GgufFile:
    """What a file holds. Tensors stay on disk until they are asked for."""

    path: Path
    metadata: Mapping[str, Any]
    """Key to a number, a string, or a list of them. Floats are the shortest decimals that are stored so:
    1e-05 and not 9.999999747378752e-06."""
    tensors: Mapping[str, ReaderTensor]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the kind of model, which most metadata keys begin with."""
        return str(self.metadata.get("general.architecture"))

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape as torch orders it; GGUF has the dimensions the other way round."""
        return tuple(int(size) for size in reversed(self.tensors[name].shape))

    def values(self, name: str) -> np.ndarray:
        """A tensor in fp32, exactly as llama.cpp's types define its values.

        Raises:
            CheckpointError: it is cut, or of a quantised type that the library does not decode.
        """
        from gguf.quants import dequantize

        tensor = self.tensors[name]
        try:
            values: np.ndarray = dequantize(tensor.data, tensor.tensor_type)
            return values.astype(np.float32).reshape(self.shape(name))
        except NotImplementedError as problem:
            raise CheckpointError(
                f"{self.path}: {name} has the type {tensor.tensor_type.name}, which the library gguf "
                "does not decode; give a file of another quantisation, such as Q8_0 or F16"
            ) from problem
        except ValueError as problem:
            raise CheckpointError(
                f"{self.path}: {name} cannot be read: {problem}; {_AGAIN}"
            ) from problem


def open_gguf(path: Path) -> GgufFile:
    """Opens a file and reads its metadata.

    Raises:
        CheckpointError: it is missing, no GGUF, cut, or one of several parts; or the library is missing.
    """
    try:
        from gguf import GGUFReader
    except ImportError as problem:
        raise CheckpointError(
            "the library gguf is not installed, which reads GGUF files; pip install 'nvlm-train[convert]'"
        ) from problem
    if not path.is_file():
        raise CheckpointError(f"file={path}: no such file; give a .gguf file")
    try:
        reader = GGUFReader(path)
    # The reader maps the file and indexes into it, so that a cut one fails in any of these ways.
    except (ValueError, IndexError, KeyError, OSError, OverflowError) as problem:
        raise CheckpointError(
            f"file={path} is no whole GGUF file: {problem}; {_AGAIN}"
        ) from problem
    metadata = {key: _plain(field) for key, field in reader.fields.items()}
    parts = metadata.get("split.count", 0)
    if parts > 1:
        raise CheckpointError(
            f"file={path} is one of split.count={parts} parts; join them: llama-gguf-split --merge"
        )
    return GgufFile(path, metadata, {tensor.name: tensor for tensor in reader.tensors})


def _plain(field: Any) -> Any:
    """A field's value; fp32 numbers become the shortest decimals that round to them."""
    value = field.contents()
    if field.types and field.types[0].name == "FLOAT32":
        return float(str(np.float32(value)))
    return value
