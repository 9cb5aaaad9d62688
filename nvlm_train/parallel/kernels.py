"""Chooses the kernels: Transformer Engine, apex or torch. No other file looks for the first two."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class Kernels:
    """Names the implementation chosen for each task. A run prints it at its start."""

    linear: Literal["transformer_engine", "megatron"]
    attention: Literal["transformer_engine", "torch_sdpa"]
    norm: Literal["transformer_engine", "torch"]
    adam: Literal["transformer_engine", "apex", "torch"]
    weight_gradient: Literal["apex", "torch", "separate"]
    """What adds a linear's weight gradient to the fp32 buffer inside its matrix product. `separate` means
    that the sum is a step of its own."""

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in vars(self).items())


@dataclass(frozen=True)
class Available:
    """Says what the machine and its Python have."""

    cuda: bool
    transformer_engine: bool
    apex: bool
    apex_weight_gradient: bool


def choose(available: Available) -> Kernels:
    """Chooses kernels from what is available. It is a pure function, so that it is tested without a GPU.

    The libraries run only on CUDA: without it they are ignored, even when they are installed.
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
    """Chooses kernels for this machine.

    PyPI's `apex` is another package; NVIDIA's apex has the extension amp_C.
    """
    return choose(
        Available(
            cuda=torch.cuda.is_available(),
            transformer_engine=_is_installed("transformer_engine"),
            apex=_is_installed("apex") and has_amp(),
            apex_weight_gradient=_is_installed("fused_weight_gradient_mlp_cuda"),
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


def install_adam() -> None:
    """Gives megatron-core `GroupStepAdamW` when no fused Adam is chosen (adam.py says why)."""
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
