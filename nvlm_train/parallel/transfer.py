"""Brings a step's arrays to the device: all of them in one copy that the host does not wait for.

On a CPU the arrays stay in one buffer of the host, and nothing else differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nvlm_train.parallel.topology import device

_ALIGNMENT = 16
"""Bytes; kernels read vectors of up to this size."""
_DTYPES = {
    np.dtype(np.int64): torch.int64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
}


def send(arrays: Sequence[NDArray[Any]]) -> list[Tensor]:
    """Copies arrays of int64, int32, float32 or float64 to the device, through one pinned buffer.

    Returns:
        Tensors of the same shapes and values, in order; views of one buffer.
    """
    starts = np.cumsum([0, *(-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays)])
    size = int(starts[-1])
    pinned = torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    bytes_ = pinned.numpy()
    for array, start in zip(arrays, starts, strict=False):
        bytes_[start : start + array.nbytes] = (
            np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        )
    there = pinned.to(device(), non_blocking=True)
    return [
        there[start : start + array.nbytes].view(_DTYPES[array.dtype]).view(array.shape)
        for array, start in zip(arrays, starts.tolist(), strict=False)
    ]


def send_pixels(pixels: Tensor) -> Tensor:
    """Copies a large tensor of the host to the device without waiting for it."""
    if torch.cuda.is_available():
        pixels = pixels.pin_memory()
    return pixels.to(device(), non_blocking=True)
