"""Runs one round: tile-parallel encoding, then the 1F1B schedule over its microbatches.

Training needs losses of its labels and generation logits, and they do different things with them: each brings
its own `Finish`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from nvlm_train.device_batch import DevicePack, DeviceRound
from nvlm_train.parallel.topology import Topology
from nvlm_train.vision.ahead import FeatureSource


@dataclass(frozen=True)
class Replica:
    """Holds this rank's shard of one model replica. `model` may be wrapped in megatron-core's DDP."""

    model: nn.Module
    features: FeatureSource
    topology: Topology
    sequence_length: int
    """A sample, or a prompt with its answer, has at most this many tokens."""
    pack_lengths: tuple[int, ...]
    """A pack is filled up to one of these, ascending."""


Finish = Callable[[DevicePack, Tensor], tuple[Tensor, Any]]
"""What the last pipeline stage does with a pack: it takes the losses of its labels, fp32 [L], or where it has
none vocabulary-parallel logits of the wanted positions, [L, 1, V / TP]. It returns a scalar for the backward,
and a result."""


def run_round(
    replica: Replica, round_: DeviceRound, finish: Finish, forward_only: bool
) -> list[Any]:
    """Encodes a round's tiles and runs its packs. Called by every rank of a replica.

    Args:
        replica: the model and its place.
        round_: the packs and this rank's tiles.
        finish: what the last pipeline stage does with each pack.
        forward_only: whether to leave out the backward; otherwise gradients are accumulated.

    Returns:
        On the last pipeline stage the result of each pack, in order; elsewhere an empty list.
    """
    encoded = replica.features.of(round_)
    features: Sequence[Tensor | None] = encoded or [None] * len(round_.packs)
    return run_features(replica, round_.packs, features, round_.relayed, finish, forward_only)


def run_features(
    replica: Replica,
    packs: Sequence[DevicePack],
    features: Sequence[Tensor | None],
    relayed: int,
    finish: Finish,
    forward_only: bool,
) -> list[Any]:
    """Does what `run_round` does, with features that were encoded before.

    Args:
        replica: the model and its place.
        packs: the round's, all of one length.
        features: by pack, [T, tokens per tile, feature size]; None past the first pipeline stage.
        relayed: rows of context that stages send with each pack.
        finish: what the last pipeline stage does with each pack.
        forward_only: whether to leave out the backward.
    """
    inputs = zip(packs, features, strict=True)
    lengths = {sum(pack.lengths) for pack in packs}
    assert len(lengths) == 1, f"packs of one round have lengths {lengths}"
    results: list[Any] = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, relayed=relayed, finish=finish),
        data_iterator=iter(inputs),
        model=[replica.model],
        num_microbatches=len(packs),
        # What a stage sends: one shape for all packs, so that the receiver knows it.
        seq_length=lengths.pop() + relayed,
        micro_batch_size=1,
        forward_only=forward_only,
    )
    return results


Inputs = Iterator[tuple[DevicePack, Tensor | None]]


def _forward_step(
    inputs: Inputs, model: nn.Module, relayed: int, finish: Finish
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Any]]]:
    """Runs one pack through this pipeline stage, as megatron-core's `forward_step_func`."""
    pack, features = next(inputs)
    output = model(pack, features, relayed)

    def loss_function(output: Tensor) -> tuple[Tensor, Tensor, Any]:
        scalar, result = finish(pack, output)
        # Returning a token count tells megatron-core not to divide by the number of microbatches.
        # Nobody reads it, because the scalar is normalised already.
        return scalar, torch.tensor(1, dtype=torch.int), result

    return output, loss_function
