"""Which kernels run: Transformer Engine, apex, or torch. The one file that looks for the first two."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class Kernels:
    """The implementation chosen for each job; printed at start."""

    linear: Literal["transformer_engine", "megatron"]
    attention: Literal["transformer_engine", "torch_sdpa"]
    norm: Literal["transformer_engine", "torch"]
    adam: Literal["transformer_engine", "apex", "torch"]
    weight_gradient: Literal["apex", "torch", "separate"]
    """What adds a linear's weight gradient to the fp32 buffer inside its matrix product; or nothing does."""

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in vars(self).items())


@dataclass(frozen=True)
class Available:
    """What the machine and its Python have."""

    cuda: bool
    transformer_engine: bool
    apex: bool
    apex_weight_gradient: bool


def choose(available: Available) -> Kernels:
    """The rule, as a function of what there is, so that it is tested without a GPU.

    The libraries run on CUDA only: on a CPU they are ignored, installed or not.
    """
    if not available.cuda:
        return Kernels("megatron", "torch_sdpa", "torch", "torch", weight_gradient="torch")
    weight_gradient: Literal["apex", "separate"] = (
        "apex" if available.apex_weight_gradient else "separate"
    )
    if available.transformer_engine:
        engine: Literal["transformer_engine"] = "transformer_engine"
        return Kernels(engine, engine, engine, engine, weight_gradient)
    adam: Literal["apex", "torch"] = "apex" if available.apex else "torch"
    return Kernels("megatron", "torch_sdpa", "torch", adam, weight_gradient)


def detect() -> Kernels:
    """`choose` for this machine. PyPI's `apex` is another package: NVIDIA's brings the extension amp_C."""
    return choose(
        Available(
            cuda=torch.cuda.is_available(),
            transformer_engine=_is_installed("transformer_engine"),
            apex=_is_installed("apex") and has_amp(),
            apex_weight_gradient=_is_installed("fused_weight_gradient_mlp_cuda"),
        )
    )


def has_amp() -> bool:
    """Whether the extension is there that only NVIDIA's apex brings."""
    return _is_installed("amp_C")


def engine_problem() -> str | None:
    """Why Transformer Engine, though installed, cannot be imported; None where it can or is not there."""
    if not _is_installed("transformer_engine"):
        return None
    try:
        importlib.import_module("transformer_engine.pytorch")
    # It asserts that its parts are of one version.
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        return (str(error).splitlines() or [type(error).__name__])[0]
    return None


def multiplies_bf16() -> bool:
    """Whether bf16 matrix products run at the device's speed, and not through a scalar loop."""
    return torch.cuda.is_available() or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def install_adam() -> None:
    """Gives megatron-core `GroupStepAdamW` where no fused Adam is chosen (see adam.py for why)."""
    if detect().adam != "torch":
        return
    from nvlm_train.parallel.adam import GroupStepAdamW

    factory = importlib.import_module("megatron.core.optimizer")
    distributed = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    for owner, name, value in (
        (factory, "Adam", GroupStepAdamW),
        (factory, "USING_PYTORCH_OPTIMIZER", False),
        (distributed, "Adam", GroupStepAdamW),
        (distributed, "HAVE_APEX_OR_TE", True),
        (distributed, "USING_APEX_OPTIMIZER", True),
    ):
        if not hasattr(owner, name):
            raise RuntimeError(
                f"{owner.__name__}.{name} does not exist: update parallel/kernels.py"
            )
        setattr(owner, name, value)
