"""Runs on the workers: a step in which the host may wait for the device in two places only.

On a GPU CUDA's own check says where it waits (`torch.cuda.set_sync_debug_mode`): elsewhere it raises. It
does not see collectives, nor `torch.cuda.synchronize`, which is counted by hand. On a CPU, where nothing
waits, calls that read a tensor are counted (tests/train/host_reads.py).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch

from nvlm_train.config.schema import ParallelConfig
from nvlm_train.model import language
from nvlm_train.train import step as step_module
from nvlm_train.train.placing import place
from tests.gpu.paths import Path
from tests.parity import cross_gradients, cross_recipes
from tests.train.host_reads import HostReads

ALLOWED = ("gradient_norm", "reduce_step")
"""Functions of train/step.py that wait: for the gradient norm, and for what is reported."""
WARM_UP = 2
"""Steps in which kernels are compiled and memory is taken."""


class Waits(NamedTuple):
    """Counts a step's waits."""

    allowed: int
    elsewhere: int


def of_a_step(name: str, path: Path, packs: int) -> Waits:
    """Counts the waits of a step past the warm-up.

    Raises:
        RuntimeError: on a GPU, where the host waited anywhere but in `ALLOWED`.
    """
    with path.chosen():
        engine = cross_gradients.start_engine(name, ParallelConfig(), precision=path.precision)
        for number in range(WARM_UP + 1):
            mixed = cross_recipes.MIXED
            layouts = [mixed[n % len(mixed)] for n in range(packs)]
            batch = cross_recipes.step_batch(name, layouts, engine.topology.share, number, 1)
            placed = place(batch, engine.topology)
            if number < WARM_UP:
                step_module.run_step(engine, placed, num_sources=2)
                continue
            watch = _OnGpu() if torch.cuda.is_available() else _OnCpu()
            with contextlib.ExitStack() as stack:
                stack.enter_context(watch.watching())
                for function in ALLOWED:
                    stack.enter_context(_allowing(watch, function))
                step_module.run_step(engine, placed, num_sources=2)
    return Waits(watch.allowed, watch.elsewhere)


def of_a_step_with_bug(name: str, path: Path, packs: int) -> Waits:
    """Counts them when every pack's bounds are read from the device, as RoPE once did."""
    original = language.angles

    def broken(rotary: Any, pack: Any, *rest: Any) -> Any:
        pack.cu_seqlens.tolist()
        return original(rotary, pack, *rest)

    with mock.patch.object(language, "angles", broken):
        return of_a_step(name, path, packs)


def error_with_bug(name: str, path: Path) -> str:
    """Returns what CUDA's check says about the bug."""
    try:
        return str(of_a_step_with_bug(name, path, 2))
    except RuntimeError as error:
        return str(error)


class _OnGpu:
    def __init__(self) -> None:
        self.allowed = self.elsewhere = 0

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        def synchronize(*args: object) -> None:
            self.elsewhere += 1

        # What is still running from the steps before must not be waited for in here.
        torch.cuda.synchronize()
        with mock.patch.object(torch.cuda, "synchronize", synchronize), _debugging("error"):
            yield

    @contextlib.contextmanager
    def allow(self) -> Iterator[None]:
        with warnings.catch_warnings(record=True) as caught, _debugging("warn"):
            warnings.simplefilter("always")
            yield
        self.allowed += sum("synchronizing CUDA" in str(each.message) for each in caught)


class _OnCpu:
    def __init__(self) -> None:
        self.allowed = 0
        self._reads = HostReads()

    @property
    def elsewhere(self) -> int:
        return sum(self._reads.counts.values()) - self.allowed

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        with self._reads:
            yield

    @contextlib.contextmanager
    def allow(self) -> Iterator[None]:
        before = sum(self._reads.counts.values())
        yield
        self.allowed += sum(self._reads.counts.values()) - before


def _allowing(watch: _OnGpu | _OnCpu, function: str) -> contextlib.AbstractContextManager[object]:
    original: Callable[..., Any] = getattr(step_module, function)

    def allowed(*args: Any, **kwargs: Any) -> Any:
        with watch.allow():
            return original(*args, **kwargs)

    return mock.patch.object(step_module, function, allowed)


@contextlib.contextmanager
def _debugging(mode: str) -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
