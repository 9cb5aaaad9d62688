"""Chooses how an encoder's functions run: compiled by torch on a GPU, as they are on a CPU.

An encoder's batches have one shape (tile_parallel.py), so a function is compiled once in a process, and all
layers of an encoder share what was compiled of one. For InternViT-300M on an H200 that makes 1.17 times the
tiles a second of the same layers run one kernel after the other; CUDA graphs on top add nothing, because
the GPU is never idle (benchmarks/results/gpu_parts.md). On a CPU compiling takes longer than it saves.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn

Method = Callable[..., Tensor]
"""Takes its module, a tensor and perhaps more of them."""


def compiled_on_gpu(method: Method) -> Method:
    """Makes a module's method run compiled where the first tensor that it takes lies on a GPU.

    `torch.compiler.set_stance("force_eager")`, or TORCH_COMPILE_DISABLE=1 in the environment, turn it off.

    Args:
        method: takes tensors of one shape and returns one. It reads nothing of them on the host, and takes
            no branch that changes between calls.
    """

    @wraps(method)
    def chosen(module: nn.Module, x: Tensor, *more: Tensor) -> Tensor:
        run = _compiled(method) if runs_compiled(x) else method
        return run(module, x, *more)

    return chosen


def runs_compiled(x: Tensor) -> bool:
    """Whether what reads this tensor is compiled."""
    return x.is_cuda


@cache
def _compiled(method: Method) -> Method:
    """Compiles a method, when it is first called: torch's compiler takes seconds to import."""
    return torch.compile(method, dynamic=False, options=compiler_options())


def compiler_options() -> dict[str, Any]:
    """Returns options under which every rank gets the same kernels.

    Each rank compiles for itself. Where it may choose by speed (how a sum is split, whether a matrix is
    padded), two ranks may choose differently, and a tile's features would depend on who encoded it.
    """
    from torch._inductor import list_options

    wanted = {"deterministic": True, "shape_padding": False, "max_autotune": False}
    known = list_options()
    return {name: value for name, value in wanted.items() if name in known}
