"""Records which operators of ATen are called."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

SUM_IN_FP32 = torch.ops.aten.addmm.dtype_out


class RecordedCalls(TorchDispatchMode):
    """Keeps the names of all calls inside of it, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function.namespace == "aten":
            self.names.append(str(function))
        if function is SUM_IN_FP32 and not torch.cuda.is_available():
            # Tensors that only say that they are on CUDA cannot be multiplied on a CPU.
            return kwargs["out"]
        return function(*args, **kwargs)
