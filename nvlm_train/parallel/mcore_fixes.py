"""Corrects what keeps megatron-core 0.16.1 from computing as it should, on any device.

- `CheckpointWithoutOutput`, which frees a norm's output until backward needs it, takes every `fp8`
  argument but None for a yes (tensor_parallel/random.py), the default False included, and then calls
  Transformer Engine. Nothing here computes in FP8.
- `CudaRNGStatesTracker.fork` compares the host's generator before and after, reads the result, and only logs
  it. Under sequence parallelism that is a read for every microbatch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

TRACKED = "model-parallel-rng"
"""What megatron-core calls the generator of what is sharded."""
UNTRACKED = "default-rng"
"""What it calls the generator of everything else."""


def install() -> None:
    """Corrects both, once a process.

    Raises:
        RuntimeError: the generators have other names.
    """
    from megatron.core.tensor_parallel import random

    original = random.CheckpointWithoutOutput.__init__
    if getattr(original, "is_corrected", False):
        return

    def corrected(self: Any, fp8: Any = None) -> None:
        original(self, fp8)
        self.fp8 = bool(fp8)

    corrected.is_corrected = True  # type: ignore[attr-defined]
    random.CheckpointWithoutOutput.__init__ = corrected
    found = (
        random.CudaRNGStatesTracker()._current_state_name,
        random._MODEL_PARALLEL_RNG_TRACKER_NAME,
    )
    if found != (UNTRACKED, TRACKED):
        raise RuntimeError(f"generators are called {found}: update parallel/mcore_fixes.py")
    random.CudaRNGStatesTracker.fork = _fork


@contextmanager
def _fork(self: Any, name: str = TRACKED) -> Iterator[None]:
    """Draws from the generator `name`, and goes on with the one of before behind it; they may be nested."""
    from megatron.core.tensor_parallel import random

    assert name in self.states_, f"no generator {name}: the topology seeds them"
    outer, is_safe = self._current_state_name, self.use_cudagraphable_rng
    before = random._get_cuda_rng_state(graph_safe=is_safe)
    if outer != UNTRACKED:
        self.states_[outer] = before
    random._set_cuda_rng_state(self.states_[name], graph_safe=is_safe)
    self._current_state_name = name
    try:
        yield
    finally:
        self.states_[name] = random._get_cuda_rng_state(graph_safe=is_safe)
        # The same generator inside itself has gone on.
        after = before if outer == UNTRACKED else self.states_[outer]
        random._set_cuda_rng_state(after, graph_safe=is_safe)
        self._current_state_name = outer
