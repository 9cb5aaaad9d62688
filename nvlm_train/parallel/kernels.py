"""Chooses the kernels: Transformer Engine, apex or torch. No other file looks for the first two."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch


@dataclass(frozen=True)
class Kernels:
    """Names the implementation chosen for each task. A run prints it at its start."""

    linear: Literal["transformer_engine", "megatron"]
    attention: Literal["transformer_engine", "torch_varlen", "torch_flex", "torch_sdpa"]
    """Of tokens to those of their sample. What else a recipe asks of it is weighed in model/attention."""
    norm: Literal["transformer_engine", "torch"]
    adam: Literal["transformer_engine", "apex", "torch"]
    weight_gradient: Literal["transformer_engine", "apex", "torch", "separate"]
    """What adds a linear's weight gradient to the fp32 buffer inside its matrix product. `separate` means
    that the sum is a step of its own. The output layer is megatron-core's: where Transformer Engine is
    chosen, it takes apex's extension, or torch's product without it (`install`)."""
    cross_attention: Literal["torch_flex", "torch_sdpa"] = "torch_sdpa"
    """Of tokens to a context."""

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in vars(self).items())


@dataclass(frozen=True)
class Available:
    """Says what the machine and its Python have."""

    cuda: bool
    transformer_engine: bool
    apex: bool
    apex_weight_gradient: bool
    fp32_sums: bool = True
    """Whether torch adds products of bf16 factors to an fp32 matrix on CUDA: `addmm` with `out_dtype`,
    which refuses such a matrix before torch 2.10 (pytorch/pytorch#167931)."""
    half_precision_heads: bool = True
    """Whether the GPU has the matrix products that attention over whole packs is written for: compute
    capability 8.0 (A100) or later."""
    varlen: bool = True
    """Whether torch has `nn.attention.varlen`: since 2.10."""
    triton: bool = True
    """Whether torch can compile flex attention."""


def choose(available: Available) -> Kernels:
    """Chooses kernels from what is available. It is a pure function, so that it is tested without a GPU.

    The libraries run only on CUDA: without it they are ignored, even when they are installed.
    """
    if not available.cuda:
        return Kernels("megatron", "torch_sdpa", "torch", "torch", weight_gradient="torch")
    engine: Literal["transformer_engine"] = "transformer_engine"
    own: Literal["apex", "torch", "separate"] = "torch" if available.fp32_sums else "separate"
    if available.apex_weight_gradient:
        own = "apex"
    attention, cross = _torch_attention(available)
    if available.transformer_engine:
        gradient = engine if own != "separate" else own
        # Its norm takes the GPU as long as torch's and the host three times as long.
        return Kernels(engine, engine, "torch", engine, gradient, cross)
    adam: Literal["apex", "torch"] = "apex" if available.apex else "torch"
    return Kernels("megatron", attention, "torch", adam, own, cross)


def _torch_attention(
    available: Available,
) -> tuple[
    Literal["torch_varlen", "torch_flex", "torch_sdpa"], Literal["torch_flex", "torch_sdpa"]
]:
    """Chooses among torch's attentions: varlen is the fastest for tokens, flex for a context."""
    if not available.half_precision_heads or not available.triton:
        return "torch_sdpa", "torch_sdpa"
    return "torch_varlen" if available.varlen else "torch_flex", "torch_flex"


def detect() -> Kernels:
    """Chooses kernels for this machine.

    PyPI's `apex` is another package; NVIDIA's apex has the extension amp_C.
    """
    return choose(
        Available(
            cuda=torch.cuda.is_available(),
            transformer_engine=_is_installed("transformer_engine"),
            apex=_is_installed("apex") and has_amp(),
            apex_weight_gradient=_is_installed("fused_weight_gradient_mlp_cuda"),
            half_precision_heads=torch.cuda.device_count() > 0
            and torch.cuda.get_device_capability() >= (8, 0),
            varlen=_is_installed("torch.nn.attention.varlen"),
            triton=_is_installed("triton"),
            # Pre-releases of 2.10 (2.10.0a0) are earlier.
            fp32_sums=torch.torch_version.TorchVersion(torch.__version__) >= "2.10",
        )
    )


def has_amp() -> bool:
    """Returns whether the extension is installed that only NVIDIA's apex has."""
    return _is_installed("amp_C")


def engine_problem() -> str | None:
    """Returns why an installed Transformer Engine cannot be imported; None when it can, or is not there."""
    if not _is_installed("transformer_engine"):
        return None
    try:
        importlib.import_module("transformer_engine.pytorch")
    # It asserts that its parts are of one version.
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        return (str(error).splitlines() or [type(error).__name__])[0]
    return None


def multiplies_bf16() -> bool:
    """Returns whether bf16 matrix products run at the device's speed, and not in a loop of scalars."""
    return torch.cuda.is_available() or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def install() -> None:
    """Gives megatron-core what it lacks: Adam, the norm of gradients, the product of weight gradients, and
    a linear that calls few operators."""
    from nvlm_train.parallel import linear

    install_adam()
    install_gradient_norm()
    install_weight_gradient()
    linear.install()


def install_adam() -> None:
    """Gives megatron-core `GroupStepAdamW` when no fused Adam is chosen (adam.py says why)."""
    if detect().adam != "torch":
        return
    from nvlm_train.parallel.adam import GroupStepAdamW

    factory, distributed = "megatron.core.optimizer", "megatron.core.optimizer.distrib_optimizer"
    _replace(factory, Adam=GroupStepAdamW, USING_PYTORCH_OPTIMIZER=False)
    _replace(distributed, Adam=GroupStepAdamW, HAVE_APEX_OR_TE=True, USING_APEX_OPTIMIZER=True)


def install_gradient_norm() -> None:
    """Gives megatron-core a norm that stays on the device, without Transformer Engine and apex."""
    from nvlm_train.parallel.gradient_norm import l2_norm

    module = "megatron.core.optimizer.clip_grads"
    clip_grads: Any = importlib.import_module(module)
    if clip_grads.l2_norm_impl.__module__ == "megatron.core.utils":
        _replace(module, l2_norm_impl=l2_norm)


def install_weight_gradient() -> None:
    """Gives megatron-core's linears `WeightGradient` where apex's extension is not there."""
    if detect().weight_gradient in ("apex", "separate"):
        return
    from nvlm_train.parallel.weight_gradient import WeightGradient

    module = "megatron.core.tensor_parallel.layers"
    layers: Any = importlib.import_module(module)
    if hasattr(layers, "fused_weight_gradient_mlp_cuda"):
        return
    # Without apex this name does not exist; megatron-core uses it only where it calls it.
    layers.fused_weight_gradient_mlp_cuda = WeightGradient
    _replace(module, _grad_accum_fusion_available=True)


def _replace(module: str, **values: object) -> None:
    owner = importlib.import_module(module)
    for name, value in values.items():
        if not hasattr(owner, name):
            raise RuntimeError(f"{module}.{name} does not exist: update parallel/kernels.py")
        setattr(owner, name, value)


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function compiled for tensors of any size on CUDA. On CPUs compiling is off (cpu.py)."""
    return torch.compile(function, dynamic=True)
