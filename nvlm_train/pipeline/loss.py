"""Sums the training loss: cross-entropies at trained positions, divided by a global count.

The output layer computes them (model/output/token_losses.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nvlm_train.device_batch import DevicePack
from nvlm_train.pipeline.round import Finish


@dataclass(frozen=True)
class LabelLosses:
    """Holds the detached losses of one pack by label, on the device."""

    losses_L: Tensor
    """fp32 [L]."""
    weights_L: Tensor
    """fp32 [L]: 1 where the label is trained, 0 elsewhere."""
    sources_L: Tensor
    """int64 [L]: source of the label's sample, as an index into the blend."""


def training_loss(trained_tokens: Tensor, failed: Tensor) -> Finish:
    """Returns what computes the training loss of a pack.

    Args:
        trained_tokens: labels of the whole step over all data-parallel ranks, a scalar on the device; the sum
            of cross-entropies is divided by it, so that packing, rounds and layout do not matter.
        failed: int32 [samples of the replica]: 1 where a sample is not trained on.
    """
    kept = 1 - failed

    def finish(pack: DevicePack, losses_L: Tensor) -> tuple[Tensor, LabelLosses]:
        labels = pack.labels
        assert labels is not None, "packs of a step have labels"
        weights_L = kept_weights(pack, kept)
        report = LabelLosses(losses_L.detach(), weights_L, labels.sources_L)
        return (losses_L * weights_L).sum() / trained_tokens, report

    return finish


def kept_weights(pack: DevicePack, kept: Tensor) -> Tensor:
    """Returns the weight of each label, fp32 [L]: none in a sample with an image that cannot be decoded.

    Only the rank that decodes an image knows that it is broken, and all learn it on the device, where a
    weight of zero takes the label out of the loss and of every gradient.

    Args:
        pack: of a step.
        kept: int32 [samples of the replica]: 0 where a sample is not trained on, else 1.
    """
    assert pack.labels is not None, "packs of a step have labels"
    return pack.labels.weights_L * kept.index_select(0, pack.labels.samples_L)
