"""megatron-core's linear with fewer calls: one matrix product forward, two backward, on one matrix of tokens.

megatron-core's reshapes its factors anew for each product, adds the bias in a call of its own, and
passes a tensor-parallel group of one rank as carefully as any other. What a linear calls takes the host as
long on a GPU as on a CPU.

Shape legend: S tokens, I and O channels in and out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import layers, mappings
from torch import Tensor

from nvlm_train.parallel.weight_gradient import added

_of_megatron = layers.LinearWithGradAccumulationAndAsyncCommunication


class Linear:
    """Takes the place of megatron-core's autograd function, and leaves to it what this one does not do."""

    @staticmethod
    def apply(  # noqa: PLR0913, PLR0917
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gradient_accumulation_fusion: bool,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        grad_output_buffer: list[Tensor] | None,
        wgrad_deferral_limit: int | None,
        tp_group: dist.ProcessGroup,
    ) -> Tensor:
        """Computes input [..., I] times weight [O, I] transposed, plus bias [O].

        Args:
            input: fp32 or bf16, on a CPU or a GPU.
            weight: of the same dtype.
            bias: None where there is none.
            gradient_accumulation_fusion: whether the weight's gradient goes into its `main_grad` at once.
            allreduce_dgrad: whether the input's gradient is summed over tensor-parallel ranks.
            sequence_parallel: whether the input is a part of a sequence that is to be gathered.
            grad_output_buffer: where gradients wait whose products are deferred.
            wgrad_deferral_limit: how many may wait there.
            tp_group: the tensor-parallel ranks.
        """
        main_grad: Tensor | None = (
            getattr(weight, "main_grad", None) if gradient_accumulation_fusion else None
        )
        is_plain = not sequence_parallel and grad_output_buffer is None
        fits = not gradient_accumulation_fusion or (
            main_grad is not None and main_grad.dtype == torch.float32
        )
        if not is_plain or not fits or hasattr(weight, "__fsdp_param__"):
            return _of_megatron.apply(  # type: ignore[no-any-return]
                input,
                weight,
                bias,
                gradient_accumulation_fusion,
                allreduce_dgrad,
                sequence_parallel,
                grad_output_buffer,
                wgrad_deferral_limit,
                tp_group,
            )
        group = tp_group if allreduce_dgrad else None
        return _Linear.apply(input, weight, bias, main_grad, group)  # type: ignore[no-any-return]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        main_grad: Tensor | None,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        x_SI, weight_IO = x.reshape(-1, x.shape[-1]), weight_OI.t()
        product = (x_SI, weight_IO)
        output_SO = torch.mm(*product) if bias_O is None else torch.addmm(bias_O, *product)
        ctx.save_for_backward(x_SI, weight_OI)
        # Not among the saved tensors, whose version is checked: other microbatches add to it.
        ctx.main_grad = main_grad
        ctx.shape, ctx.group, ctx.bias = x.shape, group, bias_O
        # Of a view autograd would let nobody write to the output, as megatron-core's losses do.
        return output_SO.resize_(*x.shape[:-1], output_SO.shape[1])

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x_SI, weight_OI = ctx.saved_tensors
        needs_input, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        grad_SO = grad.reshape(-1, grad.shape[-1])
        grad_x = work = None
        if needs_input:
            grad_x = torch.mm(grad_SO, weight_OI).view(ctx.shape)
            if ctx.group is not None:
                work = dist.all_reduce(grad_x, group=ctx.group, async_op=True)
        grad_weight = _of_weight(ctx.main_grad, weight_OI, grad_SO, x_SI) if needs_weight else None
        grad_bias = _of_bias(ctx.bias, grad_SO) if needs_bias else None
        if work is not None:
            work.wait()
        return grad_x, grad_weight, grad_bias, None, None


def _of_weight(
    main_grad: Tensor | None, weight_OI: Tensor, grad_SO: Tensor, x_SI: Tensor
) -> Tensor | None:
    """Computes the weight's gradient, into `main_grad` where there is one; returns what autograd gets."""
    if main_grad is None:
        return torch.mm(grad_SO.t(), x_SI)
    weight_OI.main_grad = main_grad  # type: ignore[attr-defined]
    layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(x_SI, grad_SO, main_grad)
    return added(weight_OI, main_grad)


def _of_bias(bias_O: Tensor, grad_SO: Tensor) -> Tensor | None:
    """Computes the bias's gradient, like the weight's: into `main_grad` where megatron-core's DDP has one."""
    grad_O = grad_SO.sum(dim=0)
    main_grad: Tensor | None = getattr(bias_O, "main_grad", None)
    if main_grad is None or not hasattr(bias_O, "grad_added_to_main_grad"):
        return grad_O
    main_grad.add_(grad_O)
    return added(bias_O, main_grad)


def copy_to_region(input_: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Passes a tensor to tensor-parallel ranks, over which its gradient is summed; to one rank, as it is."""
    group = layers.get_tensor_model_parallel_group_if_none(group)
    if group.size() == 1:
        return input_
    return mappings.copy_to_tensor_model_parallel_region(input_, group=group)  # type: ignore[no-any-return]


def reduce_from_region(input_: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sums a tensor over tensor-parallel ranks; over one rank, it is the sum."""
    group = layers.get_tensor_model_parallel_group_if_none(group)
    if group.size() == 1:
        return input_
    return mappings.reduce_from_tensor_model_parallel_region(input_, group=group)  # type: ignore[no-any-return]


OWN: dict[str, Any] = {
    "LinearWithGradAccumulationAndAsyncCommunication": Linear,
    "copy_to_tensor_model_parallel_region": copy_to_region,
    "reduce_from_tensor_model_parallel_region": reduce_from_region,
}
"""Names in megatron.core.tensor_parallel.layers and what `install` puts in their place."""


def install() -> None:
    """Gives megatron-core's linears ours.

    Raises:
        RuntimeError: megatron-core has no such names.
    """
    for name, own in OWN.items():
        if not hasattr(layers, name):
            raise RuntimeError(
                f"{layers.__name__}.{name} does not exist: update parallel/linear.py"
            )
        setattr(layers, name, own)
