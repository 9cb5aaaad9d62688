"""The kernel paths that are compared, and the small models that their kernels take."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from nvlm_train.config.schema import ParallelConfig
from tests.train.checkpoint.other_kernels import library


@dataclass(frozen=True)
class Path:
    """Says which kernels compute, and in what precision."""

    library: Literal["own", "torch", "transformer_engine"]
    """`own` is what the process finds; the others need a GPU."""
    precision: Literal["fp32", "bf16"]

    @contextlib.contextmanager
    def chosen(self) -> Iterator[None]:
        """Builds engines on this path while it is entered."""
        before = torch.backends.cudnn.allow_tf32
        # By default cuDNN rounds factors of a convolution, the encoder's first step, to 10 bits.
        torch.backends.cudnn.allow_tf32 = self.precision != "fp32"
        try:
            with library(self.library):
                yield
        finally:
            torch.backends.cudnn.allow_tf32 = before


CPU, CPU_BF16 = Path("own", "fp32"), Path("own", "bf16")
EXACT = {"torch fp32": Path("torch", "fp32")}
"""It rounds to nothing less than fp32. Transformer Engine's products of fp32 matrices run in TF32."""
FAST = {"torch bf16": Path("torch", "bf16")}
"""Paths that train."""
HAS_ENGINE = importlib.util.find_spec("transformer_engine") is not None
if HAS_ENGINE:
    FAST["Transformer Engine bf16"] = Path("transformer_engine", "bf16")
GPU = EXACT | FAST

RECOMPUTE = {
    "attention": ParallelConfig(recompute="selective"),
    "whole layers": ParallelConfig(recompute="full"),
}
"""Every form of recomputation."""

D, X, H = (f"{name} with heads of 64" for name in "dxh")
"""Of `cross_recipes.ALL`. cuDNN's and flash attention take heads of 64 in every release."""

LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-3}
TOLERANCE = {"fp32": 1e-4, "bf16": 0.05}
"""Of each gradient's norm, against fp32 on a CPU.

fp32: one rounding is 6e-8, and sums in another order leave 1.1e-6 between a CPU's layouts; on a GPU there
are other exponentials and sums split over blocks on top. What must be told from it starts at 0.1.

bf16: one rounding is 2e-3 (2^-9). A gradient passes some 40 of them one after the other, through four
layers forward and backward, which as independent errors make 2e-3 * sqrt(80) = 0.018; 0.02 is measured on a
CPU. A leak between samples is 0.5 and more.
"""
