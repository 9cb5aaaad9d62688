"""Runs one round: tile-parallel encoding, then the 1F1B schedule over its microbatches.

Training needs losses at its positions and generation logits, and they do different things with them:
each brings its own `OutputHead`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from nvlm_train.batch import Microbatch, Round
from nvlm_train.parallel.topology import Topology, device
from nvlm_train.vision.encoder import VisionEncoder
from nvlm_train.vision.tile_parallel import encode_round


@dataclass(frozen=True)
class Replica:
    """Holds this rank's shard of one model replica. `model` may be wrapped in megatron-core's DDP."""

    model: nn.Module
    encoder: VisionEncoder
    topology: Topology
    sequence_length: int


@dataclass(frozen=True)
class OutputHead:
    """Says what the last pipeline stage does with a microbatch."""

    positions: Callable[[Microbatch], Tensor]
    """Returns the positions that the output layer sees: int64 [L], at least one."""
    finish: Callable[[Microbatch, Tensor], tuple[Tensor, Any]]
    """Takes vocabulary-parallel logits [L, 1, V / TP], or what `labels` asks for. Returns a scalar for the
    backward, and a result."""
    labels: Callable[[Microbatch], Tensor | None] = lambda microbatch: None
    """Returns the token to predict at each position, int64 [L]: the model then computes their losses, fp32
    [L], and never all logits at once."""


def run_round(replica: Replica, round_: Round, head: OutputHead, forward_only: bool) -> list[Any]:
    """Encodes a round's tiles and runs its microbatches. Called by every rank of a replica.

    Args:
        replica: the model and its place.
        round_: the microbatches and this rank's tiles.
        head: what the last pipeline stage does with each microbatch.
        forward_only: whether to leave out the backward; otherwise gradients are accumulated.

    Returns:
        On the last pipeline stage the head's result of each microbatch, in order; elsewhere an empty
        list.
    """
    encoded = encode_round(replica.encoder, round_, replica.topology)
    features: Sequence[Tensor | None] = encoded or [None] * len(round_.microbatches)
    return run_features(replica, round_.microbatches, features, head, forward_only)


def run_features(
    replica: Replica,
    microbatches: Sequence[Microbatch],
    features: Sequence[Tensor | None],
    head: OutputHead,
    forward_only: bool,
) -> list[Any]:
    """Does what `run_round` does, with features that were encoded before.

    Args:
        replica: the model and its place.
        microbatches: the round's.
        features: by microbatch, [T, tokens per tile, feature size]; None past the first pipeline stage.
        head: what the last pipeline stage does with each microbatch.
        forward_only: whether to leave out the backward.
    """
    inputs = zip(microbatches, features, strict=True)
    results: list[Any] = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, head=head),
        data_iterator=iter(inputs),
        model=[replica.model],
        num_microbatches=len(microbatches),
        seq_length=replica.sequence_length,
        micro_batch_size=1,
        forward_only=forward_only,
    )
    return results


Inputs = Iterator[tuple[Microbatch, Tensor | None]]


def _forward_step(
    inputs: Inputs, model: nn.Module, head: OutputHead
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Any]]]:
    """Runs one microbatch through this pipeline stage, as megatron-core's `forward_step_func`."""
    microbatch, features = next(inputs)
    output = model(
        microbatch.token_ids_S.to(device()),
        microbatch.image_positions.to(device()),
        features,
        microbatch.context,
        microbatch.cu_seqlens.to(device()),
        head.positions(microbatch),
        head.labels(microbatch),
    )

    def loss_function(output: Tensor) -> tuple[Tensor, Tensor, Any]:
        scalar, result = head.finish(microbatch, output)
        # Returning a token count tells megatron-core not to divide by the number of microbatches.
        # Nobody reads it, because the scalar is normalised already.
        return scalar, torch.tensor(1, dtype=torch.int), result

    return output, loss_function
