"""Parameters that a microbatch does not use still take part in its backward, with gradient zero.

Overlapped gradient reduction counts the parameters of a bucket that have their gradient: one that a
text-only pack never touches would keep its bucket waiting.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class PassedBy:
    """Marks a module whose parts some packs do not call, although they call the module itself.

    Whoever acts when a module is called, on the weights that it is about to use, must act for all its parts
    then (pipeline/data_parallel.py).
    """


class _ZerosFor(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, like: Tensor, *parameters: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(*parameters)
        return torch.zeros_like(like)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        parameters = ctx.saved_tensors
        # Zeros for `like` too: behind it lies a norm, whose weight would be left without a gradient.
        inputs = (grad, *parameters)
        return tuple(
            torch.zeros_like(each) if needed else None
            for each, needed in zip(inputs, ctx.needs_input_grad, strict=True)
        )


def zeros_for(like: Tensor, module: nn.Module) -> Tensor:
    """Makes zeros of a tensor's shape whose backward gives every parameter of `module` the gradient zero."""
    output: Tensor = _ZerosFor.apply(like, *module.parameters())
    return output
