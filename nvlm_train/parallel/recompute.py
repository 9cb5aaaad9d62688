"""Lets megatron-core recompute norms where there is no Transformer Engine.

Its `CheckpointWithoutOutput`, which frees a norm's output until backward needs it, takes every `fp8`
argument but None for a yes (tensor_parallel/random.py), the default False included, and then calls
Transformer Engine. Nothing here computes in FP8.
"""

from __future__ import annotations

from typing import Any


def install() -> None:
    """Corrects `CheckpointWithoutOutput` once a process."""
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

    original = CheckpointWithoutOutput.__init__
    if getattr(original, "is_corrected", False):
        return

    def corrected(self: Any, fp8: Any = None) -> None:
        original(self, fp8)
        self.fp8 = bool(fp8)

    corrected.is_corrected = True  # type: ignore[attr-defined]
    CheckpointWithoutOutput.__init__ = corrected
