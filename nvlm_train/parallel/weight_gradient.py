"""Adds products of matrices to fp32 sums, with no tensor and no addition of their own.

Shape legend: S tokens, I and O channels in and out.
"""

from __future__ import annotations

import torch
from torch import Tensor


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds left @ right to an fp32 matrix in place.

    Factors in bf16 are summed in fp32 and never rounded in between on CUDA: cuBLAS writes the sum where it
    stands (`addmm` with `out_dtype`). torch has no such product on CPUs, where it is rounded to bf16 first.

    Args:
        total: fp32 [m, n]; it may be rows of a larger matrix.
        left: fp32 or bf16 [m, k].
        right: [k, n], of the same dtype.
    """
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif not total.is_cuda:
        total.add_(left @ right)
    elif left.shape[1]:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)  # type: ignore[call-overload]


class WeightGradient:
    """Takes the place of apex's `fused_weight_gradient_mlp_cuda`, which megatron-core's linears call."""

    @staticmethod
    def wgrad_gemm_accum_fp32(input_SI: Tensor, grad_SO: Tensor, main_grad_OI: Tensor) -> None:
        """Adds grad^T @ input to the fp32 gradient [O, I] in place."""
        add_product(main_grad_OI, grad_SO.t(), input_SI)


def added(parameter: Tensor, main_grad: Tensor) -> Tensor | None:
    """Says that a parameter's gradient is in `main_grad`, and returns what autograd gets of it.

    megatron-core's hook on a parameter must see a gradient to know that the parameter is done, and does
    not read it: `grad_added_to_main_grad` says so. Only one of a parameter marked `zero_out_wgrad` is read.
    On a CPU the hook sees `main_grad` itself, and a hook of a user's on the parameter gets None. On a GPU
    autograd has to get a tensor, for the hook would run on another thread without one.
    """
    if not hasattr(parameter, "grad_added_to_main_grad"):
        return None
    parameter.grad_added_to_main_grad = True
    if getattr(parameter, "zero_out_wgrad", False):
        return torch.zeros_like(parameter)
    if parameter.is_cuda or main_grad.dtype != parameter.dtype:
        return torch.empty_like(parameter)
    parameter.grad = main_grad
    return None
