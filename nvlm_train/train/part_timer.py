"""Splits the time of a step by what this rank did: encode, layers, output, optimizer, or none of them.

Marks are set where one part ends and the next begins: around the features of a round, by hooks on the model
and on its layers, by gradients that pass between them in the backward, and by the step around the
optimizer. What lies between two marks belongs to the first one's part, so the parts always add up to the
whole.

On a GPU a mark is an event on the stream, and nobody waits for it: at the end of a step those that the GPU
has passed are read. The last ones, of the optimizer, are read a step later. That is also when their time
goes by for the host, whose clock gives the step its seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from nvlm_train.parallel.waiting import waited
from nvlm_train.pipeline.round import Finish

Part = Literal["encode", "layers", "output", "optimizer", "waiting"]


@dataclass(frozen=True)
class PartSeconds:
    """Every step writes these fields: they say where the seconds of rank 0 went, and add up to them. On a GPU
    the time is the GPU's; on a CPU what other ranks kept waiting is in `seconds/waiting`, in any part."""

    encode: float = 0.0
    """The rank encoded its share of the tiles, or waited for features of tiles, for this long. [seconds]"""
    layers: float = 0.0
    """Projector, layers and cross-attention of its stage took this long, forward and backward. [seconds]"""
    output: float = 0.0
    """Logits and loss took this long; only the last pipeline stage has them. [seconds]"""
    optimizer: float = 0.0
    """The gradient norm, clipping and the update took this long. [seconds]"""
    waiting: float = 0.0
    """The rank did none of these for this long: it waited for data, ranks or its host, or saved. [seconds]"""

    @property
    def total(self) -> float:
        """All of them."""
        return sum(vars(self).values())


PARTS: tuple[Part, ...] = ("encode", "layers", "output", "optimizer", "waiting")
COMPUTED: tuple[Part, ...] = ("encode", "layers", "output")
"""Parts whose FLOPs are counted (`costs.StepFlops`)."""
assert tuple(each.name for each in fields(PartSeconds)) == PARTS


class Timeline(Protocol):
    """Where marks are put, and what lies between them."""

    def enter(self, part: Part) -> None:
        """Ends the present part and begins another."""
        ...

    def read(self) -> PartSeconds:
        """Returns the seconds of each part since the last call, as far as they are known."""
        ...


class PartTimer:
    """Says what this rank's time goes to.

    Args:
        timeline: by default the GPU's where there is one, else the host's.
    """

    def __init__(self, timeline: Timeline | None = None) -> None:
        by_device = GpuTimeline if torch.cuda.is_available() else HostTimeline
        self._timeline: Timeline = by_device() if timeline is None else timeline

    def read(self) -> PartSeconds:
        """Returns the seconds of each part since the last call. It waits for nothing."""
        return self._timeline.read()

    @contextmanager
    def within(self, part: Part) -> Iterator[None]:
        """Counts a block as a part; what follows is waiting, until another part begins."""
        self._timeline.enter(part)
        yield
        self._timeline.enter("waiting")

    def watch(self, model: nn.Module, last_layers: nn.Module | None) -> None:
        """Sets marks around modules, from now on.

        Args:
            model: this pipeline stage. Its output is the next stage's input, or logits.
            last_layers: the layers of the last pipeline stage, which logits follow; None on other stages.
        """
        model.register_forward_pre_hook(lambda *_: self._timeline.enter("layers"))
        model.register_forward_hook(lambda *_: self._timeline.enter("waiting"))
        if last_layers is None:
            model.register_forward_hook(lambda module, args, sent: self._backward("layers", sent))
        else:
            last_layers.register_forward_hook(lambda module, args, states: self._to_output(states))

    def timed(self, finish: Finish) -> Finish:
        """The same loss; it, and the backward from there to the layers, count as output."""

        def timed_finish(*inputs: Any) -> tuple[Tensor, Any]:
            with self.within("output"):
                scalar, result = finish(*inputs)
            self._backward("output", scalar)
            return scalar, result

        return timed_finish

    def _to_output(self, states: Tensor) -> None:
        """The layers have ended and the output begins; in the backward it is the other way round."""
        self._timeline.enter("output")
        if states.requires_grad:
            states.register_hook(lambda gradient: self._timeline.enter("layers"))

    def _backward(self, part: Part, output: Tensor) -> None:
        """Counts the backward from `output` as a part, until another begins in it or all of it is done."""

        def begin(gradient: Tensor) -> None:
            self._timeline.enter(part)
            Variable._execution_engine.queue_callback(lambda: self._timeline.enter("waiting"))  # type: ignore[no-untyped-call]

        if output.requires_grad:
            output.register_hook(begin)


class HostTimeline:
    """Marks of the host's clock. Seconds that it was blocked by other ranks are waiting, in any part."""

    def __init__(self) -> None:
        self._part: Part = "waiting"
        self._at, self._waited = time.perf_counter(), waited()
        self._seconds = dict.fromkeys(PARTS, 0.0)

    def enter(self, part: Part) -> None:
        """Ends the present part and begins another."""
        now, blocked = time.perf_counter(), waited()
        self._seconds[self._part] += now - self._at - (blocked - self._waited)
        self._seconds["waiting"] += blocked - self._waited
        self._part, self._at, self._waited = part, now, blocked

    def read(self) -> PartSeconds:
        """Returns the seconds of each part since the last call; the present one goes on."""
        self.enter(self._part)
        found, self._seconds = self._seconds, dict.fromkeys(PARTS, 0.0)
        return PartSeconds(**found)


class GpuTimeline:
    """Marks on the GPU's stream.

    Args:
        make_event: makes an event that can be timed, `torch.cuda.Event`'s kind.
    """

    def __init__(self, make_event: Callable[[], Any] | None = None) -> None:
        self._make_event = make_event or (lambda: torch.cuda.Event(enable_timing=True))
        self._marks: list[tuple[Part, Any]] = []
        self._free: list[Any] = []
        self.enter("waiting")

    def enter(self, part: Part) -> None:
        """Ends the present part and begins another, when the stream comes to here."""
        event = self._free.pop() if self._free else self._make_event()
        event.record()
        self._marks.append((part, event))

    def read(self) -> PartSeconds:
        """Returns the seconds of the parts that the stream has passed since the last call."""
        seconds = dict.fromkeys(PARTS, 0.0)
        passed = len(self._marks)
        # A stream passes its marks in order, and most of them are passed.
        while passed and not self._marks[passed - 1][1].query():
            passed -= 1
        for (part, start), (_, end) in zip(
            self._marks[:passed], self._marks[1:passed], strict=False
        ):
            seconds[part] += start.elapsed_time(end) / 1e3
        if passed:
            # The last mark that was passed begins what is read next time.
            self._free += [event for _, event in self._marks[: passed - 1]]
            self._marks = self._marks[passed - 1 :]
        return PartSeconds(**seconds)
