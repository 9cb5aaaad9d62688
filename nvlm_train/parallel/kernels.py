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

    def __str__(self) -> str:
        return f"linear={self.linear} attention={self.attention} norm={self.norm} adam={self.adam}"


def choose(has_cuda: bool, has_transformer_engine: bool, has_apex: bool) -> Kernels:
    """The rule, as a function of what the machine has, so that it is tested without a GPU.

    Both libraries run on CUDA only: on a CPU they are ignored, installed or not.
    """
    if has_cuda and has_transformer_engine:
        engine: Literal["transformer_engine"] = "transformer_engine"
        return Kernels(linear=engine, attention=engine, norm=engine, adam=engine)
    adam: Literal["apex", "torch"] = "apex" if has_cuda and has_apex else "torch"
    return Kernels(linear="megatron", attention="torch_sdpa", norm="torch", adam=adam)


def detect() -> Kernels:
    """`choose` for this machine. PyPI's `apex` is another package: NVIDIA's has `apex.optimizers`."""
    apex = importlib.util.find_spec("apex")
    has_apex = apex is not None and importlib.util.find_spec("amp_C") is not None
    has_engine = importlib.util.find_spec("transformer_engine") is not None
    return choose(torch.cuda.is_available(), has_engine, has_apex)


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
