"""torch's flight recorder: which collectives a rank has started, kept in memory until somebody asks."""

from __future__ import annotations

import json
import os
from typing import Any

_ENTRIES = "2000"


def record_collectives() -> None:
    """Turns the recorder on, where the environment does not say otherwise. Call before a world is joined.

    A timeout inside NCCL then dumps its own trace as well (TORCH_NCCL_DUMP_ON_TIMEOUT).
    """
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", _ENTRIES)
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")


def recorded() -> dict[str, Any]:
    """The recorder's content, in its own JSON format; empty where this torch has none."""
    from torch._C import _distributed_c10d as c10d

    dump = getattr(c10d, "_dump_fr_trace_json", None)
    return json.loads(dump()) if dump is not None else {}


def waiting_in(trace: dict[str, Any]) -> str | None:
    """The oldest collective that this rank has started and not finished, or none."""
    for entry in trace.get("entries", ()):
        if not entry.get("retired", True) and entry.get("state") != "completed":
            group = entry.get("process_group", ["", ""])[1]
            return f"{entry.get('profiling_name')} #{entry.get('collective_seq_id')} of {group}"
    return None
