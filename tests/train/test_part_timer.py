"""What a step's time goes to: marks on a host's clock and on a stream, around modules and their backward."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nvlm_train.parallel.waiting import waiting
from nvlm_train.train.part_timer import GpuTimeline, HostTimeline, Part, PartSeconds, PartTimer


class Written:
    """A timeline that remembers the parts."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def enter(self, part: Part) -> None:
        self.parts.append(part)

    def read(self) -> PartSeconds:
        return PartSeconds()


class Stage(nn.Module):
    """A pipeline stage: layers, and on the last one logits behind them."""

    def __init__(self, is_last: bool) -> None:
        super().__init__()
        self.layers = nn.Linear(4, 4)
        self.output = nn.Linear(4, 3) if is_last else None

    def forward(self, x: Tensor) -> Tensor:
        states = self.layers(x)
        return states if self.output is None else self.output(states)


def loss(microbatch: Any, logits: Tensor) -> tuple[Tensor, str]:
    return logits.square().mean(), "result"


def test_marks_of_the_last_stage() -> None:
    """Forward and backward go through layers and output, in opposite orders."""
    written, stage = Written(), Stage(is_last=True)
    timer = PartTimer(written)
    timer.watch(stage, stage.layers)
    finish = timer.timed(loss)
    with timer.within("encode"):
        features = torch.ones(2, 4)
    scalar, result = finish(None, stage(features))
    assert result == "result"
    forward = ["encode", "waiting", "layers", "output", "waiting", "output", "waiting"]
    assert written.parts == forward
    scalar.backward()
    assert written.parts == [*forward, "output", "layers", "waiting"]


def test_marks_of_another_stage() -> None:
    written, stage = Written(), Stage(is_last=False)
    timer = PartTimer(written)
    timer.watch(stage, None)
    stage(torch.ones(2, 4)).backward(torch.ones(2, 4))
    assert written.parts == ["layers", "waiting", "layers", "waiting"]


def test_without_gradients_there_is_no_backward_to_mark() -> None:
    written, stage = Written(), Stage(is_last=True)
    timer = PartTimer(written)
    timer.watch(stage, stage.layers)
    with torch.no_grad():
        stage(torch.ones(2, 4))
    assert written.parts == ["layers", "output", "waiting"]


def test_marks_change_no_gradient() -> None:
    plain, watched = Stage(is_last=True), Stage(is_last=True)
    watched.load_state_dict(plain.state_dict())
    timer = PartTimer(Written())
    timer.watch(watched, watched.layers)
    finish = timer.timed(loss)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    loss(None, plain(x))[0].backward()
    finish(None, watched(x))[0].backward()
    for one, other in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_the_host_s_clock_leaves_out_what_others_keep_waiting() -> None:
    timeline = HostTimeline()
    began = time.perf_counter()
    timeline.enter("layers")
    time.sleep(0.02)
    with waiting():
        time.sleep(0.05)
    timeline.enter("optimizer")
    time.sleep(0.02)
    found = timeline.read()
    elapsed = time.perf_counter() - began
    assert 0.02 <= found.layers <= elapsed - 0.07
    assert found.waiting >= 0.05 and found.optimizer >= 0.02
    assert found.encode == found.output == 0.0
    assert found.total == pytest.approx(elapsed, abs=5e-3)
    assert timeline.read().total < 0.02, "read once"


class Stream:
    """A stream that passes its marks at given times, in milliseconds; `passed` of them so far."""

    def __init__(self, times: list[float]) -> None:
        self.times, self.passed, self.recorded = times, 0, 0
        self.made = 0

    def event(self) -> SimpleNamespace:
        self.made += 1
        event = SimpleNamespace(number=-1)

        def record() -> None:
            event.number, self.recorded = self.recorded, self.recorded + 1

        def elapsed_time(end: Any) -> float:
            assert end.query() and event.query(), "a read of an event that has not come waits"
            return self.times[end.number] - self.times[event.number]

        event.record = record
        event.query = lambda: event.number < self.passed
        event.elapsed_time = elapsed_time
        return event


def test_a_stream_s_marks_are_read_when_it_has_passed_them() -> None:
    """What the stream has not come to is read the next time, and nothing is waited for."""
    stream = Stream([0.0, 100.0, 250.0, 400.0, 1000.0, 1100.0, 1300.0])
    timeline = GpuTimeline(stream.event)
    assert timeline.read() == PartSeconds(), "nothing has been passed"
    for part in ("encode", "layers", "optimizer", "waiting"):
        timeline.enter(part)
    stream.passed = 4
    assert timeline.read() == PartSeconds(waiting=0.1, encode=0.15, layers=0.15)
    assert timeline.read() == PartSeconds()
    for part in ("encode", "waiting"):
        timeline.enter(part)
    stream.passed = 7
    found = timeline.read()
    assert found.optimizer == pytest.approx(0.6) and found.waiting == pytest.approx(0.1)
    assert found.encode == pytest.approx(0.2)
    assert stream.made == 5, "events that were read are used again"


@pytest.mark.gpu
def test_a_gpu_s_parts_are_those_of_its_work() -> None:
    """Two products of one size in each part take about the same time, and reading does not synchronise."""
    timeline = GpuTimeline()
    matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        matrix @ matrix
    torch.cuda.synchronize()
    timeline.read()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for part in ("layers", "output", "waiting"):
            timeline.enter(part)
            for _ in range(20):
                matrix @ matrix
        timeline.enter("optimizer")
        early = timeline.read()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    late = timeline.read()
    layers, output = early.layers + late.layers, early.output + late.output
    assert layers == pytest.approx(output, rel=0.2) and layers > 1e-3
