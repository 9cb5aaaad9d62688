"""Computes bf16 matrix products in fp32, on CPUs without bf16 products (no AVX512-BF16, no AMX).

On such CPUs torch multiplies bf16 in a loop of scalars, up to 100 times slower than fp32
(docs/megatron-on-cpu.md). Widening the factors to fp32 loses nothing, and a sum of products is
rounded to bf16 once, as tensor cores do. So a recipe for GPUs can be tried on a laptop.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, library

from nvlm_train.parallel import kernels

_ROUNDED, _KEPT = torch.bfloat16, torch.float32

PRODUCTS: dict[str, tuple[torch.dtype, ...]] = {
    "mm": (_ROUNDED,),
    "addmm": (_ROUNDED,),
    "_slow_conv2d_forward": (_ROUNDED,),
    "_scaled_dot_product_flash_attention_for_cpu": (_ROUNDED, _KEPT),
    "_scaled_dot_product_flash_attention_for_cpu_backward": (_ROUNDED, _ROUNDED, _ROUNDED),
}
"""ATen operator with products of training or generation -> dtypes of its results for bf16 inputs."""

_installed: list[library.Library] = []  # keeps the library alive, and with it its kernels


def install() -> None:
    """Replaces torch's CPU kernels of `PRODUCTS`; returns at once where bf16 products are fast."""
    if kernels.multiplies_bf16() or _installed:
        return
    ours = library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
        for name, dtypes in PRODUCTS.items():
            wide = _InFp32(library.get_kernel(f"aten::{name}", "CPU"), dtypes)
            ours.impl(name, wide, "CPU", with_keyset=True, allow_override=True)
    _installed.append(ours)


class _InFp32:
    """Calls an operator with bf16 inputs widened to fp32; inputs of other dtypes are passed on unchanged."""

    def __init__(self, kernel: Any, dtypes: tuple[torch.dtype, ...]) -> None:
        self.kernel, self.dtypes = kernel, dtypes

    def __call__(self, keys: Any, first: Tensor, *others: Any, **options: Any) -> Any:
        if first.dtype is not torch.bfloat16:
            return self.kernel.call_boxed(keys, first, *others, **options)
        found = self.kernel.call_boxed(
            keys,
            *(_widened(value) for value in (first, *others)),
            **{name: _widened(value) for name, value in options.items()},
        )
        results = (found,) if isinstance(found, Tensor) else found
        rounded = tuple(r.to(dtype) for r, dtype in zip(results, self.dtypes, strict=True))
        return rounded[0] if isinstance(found, Tensor) else rounded


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype is torch.bfloat16 else value
