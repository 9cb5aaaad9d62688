"""Computes the training loss: cross-entropy at trained positions, summed and divided by a global count."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
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

    def finish(microbatch: Microbatch, logits: Tensor) -> tuple[Tensor, LabelLosses]:
        labels_L, weights_L = _labels(microbatch)
        losses_L = vocab_parallel_cross_entropy(logits.float(), labels_L[:, None])[:, 0]
        numbers = microbatch.label_samples_L.tolist()
        sources = [microbatch.samples[number].source for number in numbers]
        report = LabelLosses(losses_L.detach()[: len(sources)], sources)
        return (losses_L * weights_L).sum() / trained_tokens, report

    return OutputHead(_positions, finish)


def _positions(microbatch: Microbatch) -> Tensor:
    """Returns the trained positions. A pack without labels keeps position 0, with weight zero.

    So every pack has a backward, and no pipeline stage and no collective waits for one in vain.
    """
    if len(microbatch.label_positions_L):
        return microbatch.label_positions_L.to(device())
    return torch.zeros(1, dtype=torch.int64, device=device())


def _labels(microbatch: Microbatch) -> tuple[Tensor, Tensor]:
    """Returns the label at each of `_positions`, int64 [L], and its weight in the loss, fp32 [L]."""
    if len(microbatch.label_ids_L):
        labels_L = microbatch.label_ids_L.to(device())
        return labels_L, torch.ones(len(labels_L), device=device())
    return torch.zeros(1, dtype=torch.int64, device=device()), torch.zeros(1, device=device())
