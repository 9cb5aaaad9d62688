"""Runs on the workers: megatron-core's own norm of gradients beside ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nvlm_train.parallel.gradient_norm import l2_norm


class ScalarReads(TorchDispatchMode):
    """Counts reads of single numbers, those of C++ too, while it is entered."""

    count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def both() -> list[tuple[Tensor, Tensor]]:
    """Returns ours and megatron-core's for several lists of gradients."""
    generator = torch.Generator().manual_seed(0)
    lists = [
        [scale * torch.randn(size, generator=generator) for size in sizes]
        for sizes in ([1], [5, 0, 7], [300, 17, 4096, 1], [64] * 40)
        for scale in (1e-6, 1.0, 1e4)
    ]
    return [(own(each), megatrons(each)) for each in lists]


def own(tensors: list[Tensor]) -> Tensor:
    """Returns our norm, fp32 [1]."""
    return l2_norm(0, torch.zeros(1), [tensors], False)[0]


def megatrons(tensors: list[Tensor]) -> Tensor:
    """Returns that of megatron-core's stand-in."""
    from megatron.core.utils import local_multi_tensor_l2_norm

    norm: Tensor = local_multi_tensor_l2_norm(0, None, [tensors], False)[0]
    return norm


def installed() -> str:
    """Returns the module of the norm that megatron-core uses."""
    from megatron.core.optimizer import clip_grads

    return str(clip_grads.l2_norm_impl.__module__)


def scalars_read() -> tuple[int, int]:
    """Counts what ours and megatron-core's read of three gradients."""
    tensors = [torch.ones(2), torch.ones(3), torch.ones(4)]
    counts = []
    for norm in (own, megatrons):
        with ScalarReads() as reads:
            norm(tensors)
        counts.append(reads.count)
    return counts[0], counts[1]
