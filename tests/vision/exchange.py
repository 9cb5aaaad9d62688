"""Runs on the workers: features on their way to the first pipeline stage, and the memory that they take."""

from __future__ import annotations

from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nvlm_train.config.schema import ParallelConfig
from nvlm_train.parallel.topology import build_topology
from nvlm_train.vision import tile_parallel

SHAPE = (4, 8)
"""Tokens of a tile, channels of a token."""


class Arrived(NamedTuple):
    """Holds what a rank got, and what it took to get it."""

    features: Tensor | None
    made_bytes: int
    """Of tensors that were made on the way, those that arrive included."""
    sends_own: bool
    """Whether what is sent is the rank's own features and no copy of them."""


class _Made(TorchDispatchMode):
    """Adds up the bytes of the storages that operators make."""

    def __init__(self) -> None:
        super().__init__()
        self.places: set[int] = set()
        self.bytes = 0
        self.kept: list[Tensor] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        before = {
            each.untyped_storage().data_ptr() for each in args if isinstance(each, torch.Tensor)
        }
        output = function(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor):
            storage = output.untyped_storage()
            if storage.data_ptr() not in before | self.places and storage.nbytes():
                self.places.add(storage.data_ptr())
                self.bytes += storage.nbytes()
                self.kept.append(output)
        return output


def exchange(parallel: ParallelConfig, split: tuple[int, ...]) -> Arrived:
    """Sends features whose values are the numbers of their tiles."""
    topology = build_topology(parallel, seed=1)
    rank = topology.replica_rank
    first = sum(split[:rank])
    numbers = torch.arange(first, first + split[rank], dtype=torch.float32)
    own = numbers.view(-1, 1, 1).expand(-1, *SHAPE).contiguous()
    sent: list[int] = []
    original = dist.all_to_all_single

    def send(output: Tensor, features: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(features.data_ptr())
        return original(output, features, *args, **kwargs)

    with mock.patch.object(dist, "all_to_all_single", send), _Made() as made:
        features = tile_parallel._to_first_stage(own, split, topology)
    return Arrived(features, made.bytes, sent in ([], [own.data_ptr()]))
