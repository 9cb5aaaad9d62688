"""Ways to compute one thing: each is compared with a reference, timed, and looked at by the profiler."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.activity import KERNEL_FAILURES, event_ms, free_memory, synchronize, trace

Row = dict[str, Any]
Run = Callable[[], Sequence[Tensor]]
"""Does the work once; returns what is compared: outputs, then gradients."""


@dataclass(frozen=True)
class Variant:
    """A way to compute something. `prepare` does what a step would do once, and is not timed."""

    name: str
    prepare: Callable[[], Run]
    needs_cuda: bool = False


@dataclass(frozen=True)
class Timing:
    """Calls before they count, and while they do."""

    warm_up: int = 3
    repeats: int = 10


def compare(
    part: str, reference: Run | None, variants: Sequence[Variant], timing: Timing
) -> list[Row]:
    """A row for each variant.

    `error` is the largest of ||found - expected|| / ||expected|| over outputs and gradients; the
    reference is computed in fp32 from the same inputs. A variant that its library refuses has `failed`
    instead, and one that a CPU lacks is left out there.

    Args:
        part: name of what is computed.
        reference: none where the variants do not return comparable tensors.
        variants: in the order of the rows.
        timing: how often each runs.
    """
    expected = None if reference is None else [each.detach() for each in reference()]
    rows = []
    for variant in variants:
        if variant.needs_cuda and not torch.cuda.is_available():
            continue
        free_memory()
        try:
            figures = _measure(variant.prepare(), expected, timing)
        except KERNEL_FAILURES as error:
            figures = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
        rows.append({"part": part, "variant": variant.name} | figures)
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def _measure(run: Run, expected: Sequence[Tensor] | None, timing: Timing) -> Row:
    figures: Row = {}
    found = run()
    if expected is not None:
        figures["error"] = float(f"{relative_error(found, expected):.3g}")
    del found
    peak = _peak_mib(run)
    activity = trace(run)
    figures["ms"] = round(event_ms(run, timing.repeats, timing.warm_up), 4)
    figures |= {
        "gpu_ms": round(activity.gpu_ms, 4),
        "kernels": activity.kernels,
        "launches": activity.launches,
        "synchronisations": activity.synchronisations,
    }
    return figures if peak is None else figures | {"peak_mib": round(peak, 1)}


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The worst of the tensors; not a number where one of them is not finite."""
    errors = [
        ((one.float().reshape(other.shape) - other.float()).norm() / other.float().norm()).item()
        for one, other in zip(found, expected, strict=True)
    ]
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def _peak_mib(run: Run) -> float | None:
    """What a call allocates besides its inputs."""
    if not torch.cuda.is_available():
        return None
    synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def with_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], output_gradient: Tensor
) -> Run:
    """Forward and backward of `function`: its output, and the gradients of `inputs`."""

    def run() -> tuple[Tensor, ...]:
        output = function(*inputs)
        return output, *torch.autograd.grad(output, inputs, output_gradient.view_as(output))

    return run


def in_fp32(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], output_gradient: Tensor
) -> Run:
    """`with_gradients` on fp32 copies of the inputs."""
    copies = [each.detach().float().requires_grad_() for each in inputs]
    return with_gradients(function, copies, output_gradient.float())


def random(*shape: int, scale: float = 1.0) -> Tensor:
    """bf16 normals on the device that want a gradient."""
    from nvlm_train.parallel.topology import device

    values = torch.randn(shape, device=device(), dtype=torch.float32) * scale
    return values.to(torch.bfloat16).requires_grad_()


def captured(run: Run, generators: Iterable[torch.Generator] = ()) -> Run:
    """The same as one CUDA graph, replayed: inputs and outputs stay where they are.

    Args:
        run: the work, without a read of the device.
        generators: those that it draws from, besides the default one.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        outputs = run()

    def replay(kept: Run = run) -> Sequence[Tensor]:
        # The graph reads weights and inputs that nobody but `run` may hold.
        graph.replay()
        return outputs

    return replay
