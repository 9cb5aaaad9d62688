"""CPU versions of what megatron-core fuses on a GPU; parallel/cpu.py puts them in their places.

On a CPU the time that they save is mostly allocation: a fresh tensor of more than 32 MB is mapped
and zeroed page by page on every use.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class WeightGradient:
    """Stands in for apex's extension `fused_weight_gradient_mlp_cuda`."""

    @staticmethod
    def wgrad_gemm_accum_fp32(input_SI: Tensor, grad_SO: Tensor, main_grad_OI: Tensor) -> None:
        """Adds grad^T @ input to the fp32 gradient in place."""
        if input_SI.dtype == main_grad_OI.dtype:
            main_grad_OI.addmm_(grad_SO.t(), input_SI)
        else:
            main_grad_OI.add_(grad_SO.t() @ input_SI)


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up of x = [gate | up]; keeps x only and writes both gradients into one tensor."""

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
    """megatron-core's `bias_swiglu_impl` for linears without bias; x is [..., 2 F], the result [..., F]."""
    assert bias is None and not any(options), "the language model's MLP has no bias"
    output: Tensor = _SwiGLU.apply(x)
    return output


def reduce_scatter(
    output: Tensor, tensor: Tensor, *, group: dist.ProcessGroup, **options: Any
) -> dist.Work | None:
    """NCCL's is free on a group of one; gloo's copies the whole gradient buffer twice."""
    if _is_in_place(output, tensor, group):
        return None
    return dist.reduce_scatter_tensor(output, tensor, group=group, **options)


def all_gather(
    output: Tensor, tensor: Tensor, *, group: dist.ProcessGroup, **options: Any
) -> dist.Work | None:
    """The same for the updated weights."""
    if _is_in_place(output, tensor, group):
        return None
    return dist.all_gather_into_tensor(output, tensor, group=group, **options)


def _is_in_place(output: Tensor, tensor: Tensor, group: dist.ProcessGroup) -> bool:
    return group.size() == 1 and output.data_ptr() == tensor.data_ptr()


def scale_in_place(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], scale: float
) -> None:
    """megatron-core's stand-in for the fused kernel allocates every gradient a second time."""
    for source, target in zip(*tensor_lists, strict=True):
        torch.mul(source, scale, out=target)
