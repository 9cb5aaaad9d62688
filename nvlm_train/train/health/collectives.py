"""Reads torch's flight recorder, which keeps in memory which collectives a rank has started."""

from __future__ import annotations

import json
import os
from typing import Any

_ENTRIES = "2000"
_RECORDERS = {"nccl": "_dump_nccl_trace_json", "gloo": "_dump_fr_trace_json"}
"""Backend -> the function of torch's bindings that returns the content of its recorder."""


def record_collectives() -> None:
    """Turns the recorder on, unless the environment says otherwise. Called before a world is joined.

    A timeout inside NCCL then dumps its own trace as well (TORCH_NCCL_DUMP_ON_TIMEOUT).
    """
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", _ENTRIES)
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")


def recorded() -> dict[str, Any]:
    """Returns the content of this world's recorder in torch's JSON format; empty when torch has none."""
    import torch.distributed as dist
    from torch._C import _distributed_c10d as c10d

    return content(c10d, dist.get_backend())


def content(c10d: Any, backend: str) -> dict[str, Any]:
    """Returns the content of a backend's recorder; empty when torch has none for it.

    NCCL and gloo have a recorder each, and only a torch that was built with NCCL has the first.

    Args:
        c10d: torch's bindings.
        backend: of the world, `nccl` or `gloo`.
    """
    dump = getattr(c10d, _RECORDERS.get(backend, ""), None)
    return json.loads(dump()) if dump is not None else {}


def waiting_in(trace: dict[str, Any]) -> str | None:
    """Returns the oldest collective that this rank has started and not finished, or None."""
    for entry in trace.get("entries", ()):
        if not entry.get("retired", True) and entry.get("state") != "completed":
            group = entry.get("process_group", ["", ""])[1]
            return f"{entry.get('profiling_name')} #{entry.get('collective_seq_id')} of {group}"
    return None
