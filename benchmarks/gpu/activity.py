"""What one call makes a GPU do, read from a trace of torch's profiler; and how long calls take."""

from __future__ import annotations

import contextlib
import gc
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

KERNEL_FAILURES = (
    RuntimeError,
    ImportError,
    NotImplementedError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
)
"""What kernel libraries raise where they lack a case; a row that meets one shows it."""

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True)
class Activity:
    """Of one call. All zero on a CPU, whose operations are counted instead."""

    gpu_ms: float
    """Time in which at least one kernel or copy ran."""
    kernels: int
    launches: int
    """Calls of the host that start kernels; a replayed graph is one."""
    synchronisations: int
    """Calls of the host that wait for a stream, an event or the device."""
    host_reads: int
    """Copies from the device to the host."""
    operations: int
    """Calls into ATen, where the CPU was traced."""
    kernel_ms: dict[str, float] = field(default_factory=dict)
    """Time of each kernel or copy by its name, summed over its runs."""

    def longest(self, count: int) -> dict[str, float]:
        """What took most of the time, by the first characters of kernels' names."""
        by_start: dict[str, float] = defaultdict(float)
        for name, ms in self.kernel_ms.items():
            by_start[name[:90]] += ms
        largest = sorted(by_start.items(), key=lambda item: -item[1])[:count]
        return {name: round(ms, 2) for name, ms in largest}


def read_activity(events: Iterable[dict[str, Any]]) -> Activity:
    """Counts the events of a Chrome trace (`traceEvents`, times in microseconds)."""
    spans: list[tuple[float, float]] = []
    counts = dict.fromkeys(
        ("kernels", "launches", "synchronisations", "host_reads", "operations"), 0
    )
    kernel_ms: dict[str, float] = defaultdict(float)
    for event in events:
        kind, name = event.get("cat"), event.get("name", "")
        if kind in ON_DEVICE:
            spans.append((event["ts"], event["ts"] + event["dur"]))
            counts["kernels"] += kind == "kernel"
            kernel_ms[name] += event["dur"] / 1e3
            counts["host_reads"] += "DtoH" in name
        elif kind in ("cuda_runtime", "cuda_driver"):
            counts["launches"] += "Launch" in name
            counts["synchronisations"] += "ynchronize" in name
        elif kind == "cpu_op":
            counts["operations"] += name.startswith("aten::")
    return Activity(gpu_ms=_union(spans) / 1e3, kernel_ms=dict(kernel_ms), **counts)


def _union(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals: work of two streams at the same time counts once."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def trace(call: Callable[[], object], keep: Path | None = None) -> Activity:
    """Runs `call` once under the profiler.

    Args:
        call: what to look at; it should have run before.
        keep: a file for the Chrome trace, with the host's operations too, which slow the host down.
            Without it, on a GPU, the device and CUDA's interface alone are recorded.
    """
    if not torch.cuda.is_available():
        return _traced(call, [ProfilerActivity.CPU], keep)
    host = [] if keep is None else [ProfilerActivity.CPU]
    found = _traced(call, [ProfilerActivity.CUDA, *host], keep)
    # The profiler and the wait at its end synchronise too.
    waits = found.synchronisations - _own_synchronisations()
    return replace(found, synchronisations=max(waits, 0))


@cache
def _own_synchronisations() -> int:
    return _traced(lambda: None, [ProfilerActivity.CUDA], None).synchronisations


def _traced(
    call: Callable[[], object], activities: list[ProfilerActivity], keep: Path | None
) -> Activity:
    synchronize()
    with profile(activities=activities) as profiler:
        call()
        synchronize()
    with tempfile.TemporaryDirectory() as directory:
        path = keep or Path(directory) / "trace.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
        return read_activity(json.loads(path.read_text())["traceEvents"])


def seconds_of(call: Callable[[], object], repeats: int, warm_up: int) -> float:
    """Median wall seconds of a call and all that it started on the device."""
    for _ in range(warm_up):
        call()
    synchronize()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def event_ms(call: Callable[[], object], repeats: int, warm_up: int) -> float:
    """Median milliseconds between two events around a call; wall time on a CPU.

    Several calls are in flight at a time, as in a step, so that the host's part counts only where the
    device waits for it.
    """
    if not torch.cuda.is_available():
        return seconds_of(call, repeats, warm_up) * 1e3
    for _ in range(warm_up):
        call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False))


def synchronize() -> None:
    """Waits for the device, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextlib.contextmanager
def fresh_memory() -> Iterator[None]:
    """Starts the peak of allocated memory anew, and frees what was left when done."""
    free_memory()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    yield
    free_memory()


def free_memory() -> None:
    """Gives unused memory back to the device; cycles hold tensors until they are collected."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_gib() -> float | None:
    """Peak of allocated memory since `fresh_memory`; none on a CPU."""
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None


def describe_device() -> dict[str, str]:
    """What a result is of: card, torch, Transformer Engine where it is installed, megatron-core."""
    import importlib.metadata

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    found = {"device": name, "torch": torch.__version__}
    for package in ("megatron-core", "transformer-engine", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
