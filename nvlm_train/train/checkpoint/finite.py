"""Finds weights and moments that are not finite, so that they are neither saved nor trained on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nvlm_train.parallel.topology import device
from nvlm_train.train.checkpoint.shares import MOMENTS
from nvlm_train.train.engine import Engine
from nvlm_train.train.optimizer import parts

ENCODER = "vision_encoder"
"""Prefix of the names of the encoder's parameters, which are in no checkpoint."""


def not_finite(engine: Engine) -> list[str]:
    """Names the tensors that hold NaN or infinity. Called by all ranks.

    Each tensor is read once on its device; the host waits for the device once.

    Returns:
        The same list on every rank, empty when everything is finite: names of parameters, and
        `NAME of the optimizer` for the optimizer's copies and moments.
    """
    names, largest = [], []
    for name, tensor in _tensors(engine):
        if tensor.numel():
            names.append(name)
            # The largest magnitude is NaN when one of the values is NaN.
            largest.append(torch.linalg.vector_norm(tensor, ord=float("inf")).float())
    finite = torch.stack(largest).isfinite() if largest else torch.ones(1, dtype=torch.bool)
    broken = (~finite).to(device())
    count = broken.sum()
    dist.all_reduce(count)
    if not int(count):
        return []
    own = [name for name, is_broken in zip(names, broken.tolist(), strict=False) if is_broken]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    return sorted({name for each in gathered for name in each})


def summary(names: list[str]) -> str:
    """Returns the first three names, and the number of the others.

    >>> summary(["a", "b", "c", "d"])
    'not finite: a, b, c and 1 more'
    """
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"not finite: {', '.join(names[:3])}{more}"


def _tensors(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """Yields what the rank trains with. The optimizer does not keep the names of its tensors."""
    for name, parameter in engine.whole_model().named_parameters():
        yield name, parameter.data
    for name, parameter in engine.encoder.named_parameters():
        yield f"{ENCODER}.{name}", parameter.data
    for part in parts(engine.optimizer):
        for group in [] if part.is_stub_optimizer else part.optimizer.param_groups:
            for parameter in group["params"]:
                yield "weights of the optimizer", parameter.data
                for kind in MOMENTS:
                    if kind in part.optimizer.state[parameter]:
                        yield f"{kind} of the optimizer", part.optimizer.state[parameter][kind]
