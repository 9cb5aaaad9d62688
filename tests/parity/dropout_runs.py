"""Runs on the workers: steps with dropout, their gradients and their finite differences, and their masks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel import random
from torch import Tensor, nn

from nvlm_train.batch import StepBatch
from nvlm_train.config.schema import ParallelConfig
from nvlm_train.model import cross_attention, global_weights
from nvlm_train.model.last_layer import SdpaOfWanted
from nvlm_train.model.layers import SdpaAttention
from nvlm_train.parallel.topology import device
from nvlm_train.pipeline.loss import training_loss
from nvlm_train.pipeline.round import run_features
from nvlm_train.train.engine import Engine
from nvlm_train.train.placing import place
from nvlm_train.train.reduce_metrics import count_trained_tokens
from nvlm_train.vision.tile_parallel import encode_round
from tests.parity import cross_gradients, cross_recipes, gradients, recipes

STEP = 0.003
"""Of a parameter's norm: how far a finite difference goes to either side."""

SMALL = 3.0
"""Norm that a smaller parameter counts as, such as a gate's 0.5: fp32 would drown its step."""

RANDOM = 0.5
"""Share of a direction that is not along the gradient; less than one, or a scalar's could be zero."""


@dataclass(frozen=True)
class Rates:
    """Holds the probabilities of dropout."""

    words: float = 0.0
    hidden: float = 0.0
    attention: float = 0.0


ALL = Rates(words=0.5, hidden=0.2, attention=0.2)


def start(name: str, parallel: ParallelConfig, rates: Rates) -> tuple[Engine, StepBatch]:
    """Builds `d` or one of `cross_recipes.MODELS`, and a step of its first mixed pack per replica."""
    changes = {"hidden_dropout": rates.hidden, "attention_dropout": rates.attention}
    if name == "d":
        engine = gradients.start_engine(parallel, **changes)
        packs = recipes.MIXED[:1] * engine.topology.data_size
        batch = recipes.step_batch(packs, engine.topology.share, 0)
    else:
        engine = cross_gradients.start_engine(name, parallel, **changes)
        packs = cross_recipes.MIXED[:1] * engine.topology.data_size
        batch = cross_recipes.step_batch(name, packs, engine.topology.share, 0, 1)
    # The recipe has one probability for both; the layers keep a copy of theirs.
    engine.model.module.language_model.config.hidden_dropout = rates.words
    return engine, batch


def gradients_of(
    name: str, parallel: ParallelConfig, rates: Rates
) -> tuple[float, dict[str, Tensor]]:
    """Returns loss and canonical gradients of one step."""
    engine, batch = start(name, parallel, rates)
    return gradients.of_batch(engine, batch)


def slopes(name: str, parallel: ParallelConfig, rates: Rates) -> dict[str, tuple[float, float]]:
    """Returns for every parameter the loss's slope in a direction, by backward and by finite differences.

    Both with the same masks: all generators start from the same states. Directions are along the gradient,
    so that there is a slope, and a little at random.
    """
    engine, batch = start(name, parallel, rates)
    generators = _Generators()
    found = gradients.of_batch(engine, batch)[1]
    loss = _loss_function(engine, batch, generators)
    shards: dict[str, list[Any]] = {}
    for shard in global_weights.shards(engine.model.module, lambda parameter: parameter.data):
        shards.setdefault(shard.key, []).append(shard)
    slopes: dict[str, tuple[float, float]] = {}
    for number, (key, gradient) in enumerate(sorted(found.items())):
        noise = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(number))
        direction = gradient / gradient.norm() + RANDOM * noise / noise.norm()
        own = [
            (s.data, global_weights.own_slice(global_weights.slice_of(s), direction))
            for s in shards.get(key, [])
        ]
        slopes[key] = (
            float((gradient.double() * direction.double()).sum()),
            _difference(loss, own),
        )
    return slopes


def _difference(loss: Callable[[], float], own: list[tuple[Tensor, Tensor]]) -> float:
    """Returns the central difference along this rank's slices of a direction."""
    squares = sum((float(data.double().norm() ** 2) for data, _ in own), 0.0)
    size = torch.tensor(squares, device=device())
    dist.all_reduce(size, op=dist.ReduceOp.MAX)
    step = STEP * max(float(size) ** 0.5, SMALL)
    before = [data.clone() for data, _ in own]
    sides = []
    for sign in (1, -1):
        for (data, direction), start in zip(own, before, strict=True):
            data.copy_(start + sign * step * direction.to(data.device))
        sides.append(loss())
    for (data, _), start in zip(own, before, strict=True):
        data.copy_(start)
    return (sides[0] - sides[1]) / (2 * step)


def _loss_function(
    engine: Engine, batch: StepBatch, generators: _Generators
) -> Callable[[], float]:
    placed = place(batch, engine.topology)
    trained = count_trained_tokens(placed, engine.topology)
    (round_,) = placed.rounds
    features = encode_round(engine.encoder, round_, engine.topology) or [None]

    def loss() -> float:
        generators.restore()
        reports = run_features(
            engine.replica,
            round_.packs,
            features,
            round_.relayed,
            training_loss(trained, placed.failed),
            forward_only=True,
        )
        own = sum(float((report.losses_L.double() * report.weights_L).sum()) for report in reports)
        total = torch.tensor(
            own / engine.topology.tensor_size, dtype=torch.float64, device=device()
        )
        dist.all_reduce(total)
        return float(total) / float(trained)

    return loss


class _Generators:
    """Keeps the states of the default generator and of the tracker's, to restore them."""

    def __init__(self) -> None:
        self._default = random._get_cuda_rng_state()
        self._tracked = tensor_parallel.get_cuda_rng_tracker().get_states()

    def restore(self) -> None:
        random._set_cuda_rng_state(self._default)
        tensor_parallel.get_cuda_rng_tracker().set_states(dict(self._tracked))


def attention_masks(name: str, parallel: ParallelConfig) -> list[Tensor]:
    """Returns what is left of each attention's weights, [heads, queries], by call, on this rank.

    Queries and keys are zeros and values ones in every attention of a real step: an output is the sum
    of the weights that its mask left.
    """
    engine, batch = start(name, parallel, Rates(attention=0.3))
    seen: list[Tensor] = []
    crossing = cross_attention.attend

    def of_ones(kind: type[SdpaAttention]) -> Any:
        attend = kind.attend

        def masked(self: Any, query: Tensor, key: Tensor, value: Tensor, pack: Any) -> Tensor:
            output = attend(self, query * 0, key * 0, torch.ones_like(value), pack)
            seen.append(output[..., 0].t())
            return output

        return mock.patch.object(kind, "attend", masked)

    def crossing_ones(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
        output = crossing(query * 0, key * 0, torch.ones_like(value), *rest)
        seen.append(output[..., 0].t())
        return output

    with (
        of_ones(SdpaAttention),
        of_ones(SdpaOfWanted),
        mock.patch.object(cross_attention, "attend", crossing_ones),
        torch.no_grad(),
    ):
        _forward(engine, batch)
    return seen


def hidden_masks(name: str, parallel: ParallelConfig) -> list[Tensor]:
    """Returns where dropout kept its inputs, by call, on this rank: words, then the layers' branches."""
    engine, batch = start(name, parallel, Rates(words=0.3, hidden=0.3))
    seen: list[Tensor] = []
    dropout = nn.functional.dropout

    def watched(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(dropout(torch.ones_like(input), *args, **kwargs) > 0)
        return input * seen[-1]

    with mock.patch.object(nn.functional, "dropout", watched), torch.no_grad():
        _forward(engine, batch)
    return seen


def _forward(engine: Engine, batch: StepBatch) -> None:
    _loss_function(engine, batch, _Generators())()
