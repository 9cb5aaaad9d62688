"""The norm of all gradients, without a look at any of them, where no library brings it.

Its own stand-in builds a tensor of the norms of single gradients on the host, and on a GPU waits for each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def l2_norm(
    chunk_size: int, overflow: Tensor, tensor_lists: Sequence[list[Tensor]], per_tensor: bool
) -> tuple[Tensor, None]:
    """Computes the norm over all tensors, as `multi_tensor_l2norm` of apex.

    Args:
        chunk_size: of apex's kernel; unused.
        overflow: of apex's kernel; unused.
        tensor_lists: one list of fp32 tensors of any shapes, on one device.
        per_tensor: False; nobody asks for single norms.

    Returns:
        fp32 [1] on the device of the tensors, and nothing.
    """
    assert not per_tensor, "megatron-core asks for the norm over all tensors"
    (tensors,) = tensor_lists
    return torch.stack(torch._foreach_norm(tensors)).norm().reshape(1), None
