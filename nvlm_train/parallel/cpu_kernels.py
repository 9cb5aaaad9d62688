"""CPU versions of what megatron-core fuses on a GPU; parallel/cpu.py puts them in their places.

On a CPU the time that they save is mostly allocation: a fresh tensor of more than 32 MB is mapped
and zeroed page by page on every use.
"""

from __future__ import annotations

from collections.abc import Callable
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


def _free_on_one_rank(collective: Callable[..., Any]) -> Callable[..., Any]:
    """NCCL's is free on a group of one; gloo's copies the whole gradient or weight buffer."""

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
    """megatron-core's stand-in for the fused kernel allocates every gradient a second time."""
    for source, target in zip(*tensor_lists, strict=True):
        torch.mul(source, scale, out=target)
