"""Looks for weights and moments that are not finite: they are neither saved nor trained on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nvlm_train.parallel.topology import device
from nvlm_train.train.engine import Engine
from nvlm_train.train.optimizer import parts

ENCODER = "vision_encoder"
"""Before the names of the encoder's parameters, which are in no checkpoint."""


def not_finite(engine: Engine) -> list[str]:
    """Names what holds NaN or infinity, the same list on every rank. Called by all ranks.

    Reads each tensor once where it lies, and the host once in all.

    Returns:
        Parameters' names, then `NAME of the optimizer` for its copies and moments; empty when all
        is finite.
    """
    names, largest = [], []
    for name, tensor in _tensors(engine):
        if tensor.numel():
            names.append(name)
            # The largest magnitude is NaN where one value is.
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
    """How many there are, and the first three.

    >>> summary(["a", "b", "c", "d"])
    'not finite: a, b, c and 1 more'
    """
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"not finite: {', '.join(names[:3])}{more}"


def _tensors(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """What the rank trains with. The optimizer keeps its tensors without their names."""
    for name, parameter in engine.model.module.named_parameters():
        yield name, parameter.data
    for name, parameter in engine.encoder.named_parameters():
        yield f"{ENCODER}.{name}", parameter.data
    for part in parts(engine.optimizer):
        for group in [] if part.is_stub_optimizer else part.optimizer.param_groups:
            for parameter in group["params"]:
                yield "weights of the optimizer", parameter.data
                for kind in ("exp_avg", "exp_avg_sq"):
                    if kind in part.optimizer.state[parameter]:
                        yield f"{kind} of the optimizer", part.optimizer.state[parameter][kind]
