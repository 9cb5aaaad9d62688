"""Sums the training loss: cross-entropies at trained positions, divided by a global count.

The output layer computes them (model/output/token_losses.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nvlm_train.batch import Microbatch
from nvlm_train.parallel.topology import device
from nvlm_train.pipeline.round import OutputHead


@dataclass(frozen=True)
class LabelLosses:
    """Holds the detached losses of one microbatch by label."""

    losses_L: Tensor
    """fp32 [L]."""
    sources: list[int]
    """Source of each label's sample, as an index into the blend."""


def loss_head(trained_tokens: int) -> OutputHead:
    """Returns the head that computes the training loss.

    Args:
        trained_tokens: labels of the whole step over all data-parallel ranks; the sum of
            cross-entropies is divided by it, so that packing, rounds and layout do not matter.
    """

    def finish(microbatch: Microbatch, losses_L: Tensor) -> tuple[Tensor, LabelLosses]:
        weights_L = _weights(microbatch)
        numbers = microbatch.label_samples_L.tolist()
        sources = [microbatch.samples[number].source for number in numbers]
        report = LabelLosses(losses_L.detach()[: len(sources)], sources)
        return (losses_L * weights_L).sum() / trained_tokens, report

    return OutputHead(_positions, finish, _labels)


def _positions(microbatch: Microbatch) -> Tensor:
    """Returns the trained positions. A pack without labels keeps position 0, with weight zero.

    So every pack has a backward, and no pipeline stage and no collective waits for one in vain.
    """
    if len(microbatch.label_positions_L):
        return microbatch.label_positions_L.to(device())
    return torch.zeros(1, dtype=torch.int64, device=device())


def _labels(microbatch: Microbatch) -> Tensor:
    """Returns the label at each of `_positions`, int64 [L]."""
    if len(microbatch.label_ids_L):
        return microbatch.label_ids_L.to(device())
    return torch.zeros(1, dtype=torch.int64, device=device())


def _weights(microbatch: Microbatch) -> Tensor:
    """Returns the weight in the loss of each of `_positions`, fp32 [L]."""
    number = len(microbatch.label_ids_L)
    return torch.ones(number, device=device()) if number else torch.zeros(1, device=device())
