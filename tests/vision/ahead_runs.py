"""Runs on the workers, or on a GPU: training whose rounds are encoded one ahead, beside training without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from nvlm_train.batch import StepBatch
from nvlm_train.config.schema import ParallelConfig
from nvlm_train.device_batch import DeviceRound, DeviceStep
from nvlm_train.parallel.streams import training_stream
from nvlm_train.pipeline import round as round_module
from nvlm_train.train.engine import Engine
from nvlm_train.train.placing import ahead, place
from nvlm_train.train.step import run_step
from nvlm_train.vision import ahead as ahead_module
from tests.parity import cross_gradients, cross_recipes

STEPS, ROUNDS = 2, 2
Result = list[tuple[float, float]]
"""By step, loss and gradient norm."""


@dataclass
class Found:
    """Holds what happened, in order, and results of the steps."""

    events: list[str] = field(default_factory=list)
    ahead: Result = field(default_factory=list)
    at_once: Result = field(default_factory=list)
    is_same_other: bool = False
    is_same_next: bool = False
    seconds_beside: float = 0.0


def order_of_encoding(parallel: ParallelConfig) -> Found:
    """Trains two steps of two rounds twice: with rounds expected, and without."""
    found = Found()
    found.at_once = _train(_placed(engine := _engine(parallel)), engine)
    engine = _engine(parallel)
    steps = _placed(engine)
    rounds = [round_ for step in steps for round_ in step.rounds]
    engine.features.expect(rounds)
    with _recorded(found.events, rounds):
        found.ahead = _train(steps, engine)
    return found


def with_another_round_between() -> Found:
    """Asks for a round that nobody expected while an expected one is under way."""
    found, engine = Found(), _engine(ParallelConfig())
    first, other = (step.rounds for step in _placed(engine))
    names = [*first, other[0]]
    plain = [_tensors(engine.features.of(each)) for each in (first[1], other[0])]
    engine.features.expect(first)
    with _recorded(found.events, names):
        engine.features.of(first[0])
        between, after = engine.features.of(other[0]), engine.features.of(first[1])
    found.events[-1] = found.events[-1].replace("2", "other")
    found.is_same_next = torch.equal(plain[0], _tensors(after))
    found.is_same_other = torch.equal(plain[1], _tensors(between))
    return found


def steps_on_a_gpu() -> Found:
    """Trains on one stream, then as the train loop does: on two."""
    found = Found()
    found.at_once = _train(_placed(engine := _engine(ParallelConfig())), engine)
    with training_stream():
        engine = _engine(ParallelConfig())
        steps = ahead(iter(_batches(engine)), engine.topology, engine.features)
        found.ahead = _train(steps, engine)
        found.seconds_beside = engine.features.read_beside()
    return found


def _engine(parallel: ParallelConfig) -> Engine:
    return cross_gradients.start_engine("h", parallel)


def _batches(engine: Engine) -> list[StepBatch]:
    layouts = [cross_recipes.MIXED[n % len(cross_recipes.MIXED)] for n in range(4)]
    share = engine.topology.share
    return [cross_recipes.step_batch("h", layouts, share, n, ROUNDS) for n in range(STEPS)]


def _placed(engine: Engine) -> list[DeviceStep]:
    return [place(batch, engine.topology) for batch in _batches(engine)]


def _train(steps: Any, engine: Engine) -> Result:
    results = [run_step(engine, step, num_sources=2) for step in steps]
    return [(result.loss, result.grad_norm) for result in results]


def _tensors(features: list[Tensor] | None) -> Tensor:
    assert features is not None, "one rank is the first pipeline stage"
    return torch.cat(features)


@contextmanager
def _recorded(events: list[str], rounds: list[DeviceRound]) -> Iterator[None]:
    """Notes which rounds are encoded and trained, by their number."""
    encode, train = ahead_module.encode_round, round_module.run_features

    def encoding(encoder: Any, round_: DeviceRound, topology: Any) -> Any:
        events.append(f"encode {_number(rounds, round_)}")
        return encode(encoder, round_, topology)

    def training(replica: Any, packs: Any, *others: Any) -> Any:
        number = next(n for n, each in enumerate(rounds) if each.packs is packs)
        events.append(f"train {number}")
        return train(replica, packs, *others)

    with (
        mock.patch.object(ahead_module, "encode_round", encoding),
        mock.patch.object(round_module, "run_features", training),
    ):
        yield


def _number(rounds: list[DeviceRound], round_: DeviceRound) -> int:
    return next(n for n, each in enumerate(rounds) if each is round_)
