"""CPU versions of kernels that megatron-core fuses on a GPU; parallel/cpu.py installs them.

On a CPU they mostly save the time of allocation: a new tensor of more than 32 MB is mapped and zeroed
page by page on every use.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _SwiGLU(torch.autograd.Function):
    """Computes silu(gate) * up of x = [gate | up]; keeps x only, and writes both gradients to one tensor."""

    @staticmethod
    def forward(ctx: Any, x_SF: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x_SF)
        gate, up = x_SF.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x_SF,) = ctx.saved_tensors
        gate, up = x_SF.chunk(2, dim=-1)
        grad_x = torch.empty_like(x_SF)
        grad_gate, grad_up = grad_x.chunk(2, dim=-1)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        torch.ops.aten.silu.out(gate, out=grad_up)
        grad_up.mul_(grad)
        return grad_x


def swiglu(x: Tensor, bias: Tensor | None, *options: bool) -> Tensor:
    """Does what megatron-core's `bias_swiglu_impl` does for linears without bias: [..., 2 F] to [..., F]."""
    assert bias is None and not any(options), "the language model's MLP has no bias"
    output: Tensor = _SwiGLU.apply(x)
    return output


class _RMSNorm(torch.autograd.Function):
    """Computes the root-mean-square norm. Composed by autograd, its backward would read memory more often."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_H: Tensor, eps: Tensor) -> Tensor:  # type: ignore[override]
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.addcmul(eps, norm, norm, value=1 / x.shape[-1]).rsqrt_()
        ctx.save_for_backward(x, weight_H, scale)
        return torch.mul(x, scale).mul_(weight_H)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:  # type: ignore[override]
        x, weight_H, scale = ctx.saved_tensors
        size = x.shape[-1]
        normed = torch.mul(x, scale)
        products = torch.mul(grad, normed)
        products_SH = products.reshape(-1, size)
        grad_weight = products_SH.sum(dim=0) if ctx.needs_input_grad[1] else None
        along_x = torch.mv(products_SH, weight_H).view(scale.shape)
        # The products are read; their memory takes the result.
        grad_x = torch.mul(grad, weight_H, out=products)
        return grad_x.addcmul_(normed, along_x, value=-1 / size).mul_(scale), grad_weight, None


@functools.cache
def _constant(value: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(value, dtype=dtype)


def rms_norm(x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """Returns x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32 or fp64."""
    output: Tensor = _RMSNorm.apply(x, weight_H, _constant(eps, x.dtype))
    return output


class _Rotary(torch.autograd.Function):
    """Rotates the pairs (x[i], x[i + D / 2]) by their angles; the backward rotates the gradient back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(cosine, sine)
        return _turned(x, cosine, sine, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cosine, sine = ctx.saved_tensors
        return _turned(grad, cosine, sine, -1), None, None


def _turned(x: Tensor, cosine: Tensor, sine: Tensor, direction: int) -> Tensor:
    turned = torch.empty(x.shape, dtype=x.dtype)
    (first, second), (first_out, second_out) = x.chunk(2, dim=-1), turned.chunk(2, dim=-1)
    torch.mul(first, cosine, out=first_out).addcmul_(second, sine, value=-direction)
    torch.mul(second, cosine, out=second_out).addcmul_(first, sine, value=direction)
    return turned


def rotary(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotates the pairs (x[i], x[i + D / 2]) of x [S, ..., D].

    Args:
        x: queries or keys.
        cosine: of the angles, [S, ..., D / 2].
        sine: of the angles.
    """
    output: Tensor = _Rotary.apply(x, cosine, sine)
    return output


def _free_on_one_rank(collective: Callable[..., Any]) -> Callable[..., Any]:
    """Skips a collective in a group of one. NCCL does so itself; gloo copies the whole buffer."""

    def call(output: Tensor, tensor: Tensor, *, group: dist.ProcessGroup, **options: Any) -> Any:
        if group.size() == 1 and output.data_ptr() == tensor.data_ptr():
            return None
        return collective(output, tensor, group=group, **options)

    return call


reduce_scatter = _free_on_one_rank(dist.reduce_scatter_tensor)
all_gather = _free_on_one_rank(dist.all_gather_into_tensor)


def scale_in_place(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], scale: float
) -> None:
    """Scales tensors in place. megatron-core's own replacement of the fused kernel allocates each anew."""
    for source, target in zip(*tensor_lists, strict=True):
        torch.mul(source, scale, out=target)
