"""Corrections of megatron-core 0.16.1 on any device. Each names the defect and its test."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def distributed_optimizers(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    """The distributed optimizers inside megatron-core's chain that own parameters on this rank."""
    chained = (
        optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    )
    return [
        each
        for each in chained
        if isinstance(each, DistributedOptimizer) and not each.is_stub_optimizer
    ]


def keep_bucket_padding(optimizer: MegatronOptimizer) -> None:
    """Makes `fully_reshardable` optimizer checkpoints right when there are several gradient buckets.

    `get_parameter_state_dp_zero` joins the buckets without the padding between them
    (distrib_optimizer.py:1109), but `sharded_param_state_fully_reshardable` cuts the result with
    offsets that count it (:1475): every parameter behind a padding gets its neighbour's moments.
    Here the padding is put back in between. Test: tests/train/test_optimizer_state.py.
    """
    for each in distributed_optimizers(optimizer):
        each.get_parameter_state_dp_zero = MethodType(_state_with_padding, each)


def _state_with_padding(
    self: DistributedOptimizer, *args: Any, **kwargs: Any
) -> dict[Any, Any] | None:
    state = DistributedOptimizer.get_parameter_state_dp_zero(self, *args, **kwargs)
    if state is None:
        return None
    for number, buffer in enumerate(self.buffers):
        for dtype, tensors in state[number].items():
            state[number][dtype] = {
                key: _pad_buckets(value, buffer) if isinstance(value, torch.Tensor) else value
                for key, value in tensors.items()
            }
    return state


def _pad_buckets(joined: torch.Tensor, buffer: Any) -> torch.Tensor:
    padded = joined.new_zeros(buffer.numel)
    start = 0
    for bucket in buffer.buckets:
        stop = start + bucket.numel_unpadded
        padded[bucket.offset : bucket.offset + bucket.numel_unpadded] = joined[start:stop]
        start = stop
    return padded
