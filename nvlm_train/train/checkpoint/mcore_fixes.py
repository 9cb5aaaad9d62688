"""Corrects defects of megatron-core 0.16.1 that occur on any device. Each names the defect and its test."""

from __future__ import annotations

import queue
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from nvlm_train.train.optimizer import parts


def keep_results_in_the_process() -> None:
    """Gives megatron-core a plain queue for what checkpoint writers report.

    Its own queue belongs to a `multiprocessing.Manager`, which starts one more interpreter per rank
    (seconds at the first save) and outlives a rank that is killed. Writers are threads here
    (writer_threads.py).

    Raises:
        RuntimeError: megatron-core keeps its queue elsewhere.
    """
    if not hasattr(filesystem_async, "_results_queue"):
        raise RuntimeError("filesystem_async._results_queue does not exist: update mcore_fixes.py")
    filesystem_async._results_queue = queue.SimpleQueue()


_held: list[Exception] = []


def hold_file_errors() -> None:
    """Keeps rank 0 in a save when the disk fails, so that the other ranks do not wait for it.

    megatron-core lets rank 0 write three small files by itself (common.pt, .metadata, metadata.json)
    between collectives; an error there leaves the other ranks waiting for rank 0. Here the error is
    kept until all ranks can be told (`take_held_error`).
    Test: tests/train/checkpoint/test_failed_saves.py.
    """
    for owner, name in (
        (TorchCommonSaveStrategy, "save_common"),
        (filesystem_async.FileSystemWriterAsync, "finish"),
        (serialization, "save_config"),
    ):
        original = getattr(owner, name)
        if getattr(original, "__name__", "") != "holding":
            setattr(owner, name, _holding(original))


def _holding(original: Callable[..., None]) -> Callable[..., None]:
    def holding(*args: Any, **kwargs: Any) -> None:
        try:
            original(*args, **kwargs)
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            _held.append(error)

    return holding


def take_held_error() -> Exception | None:
    """Returns the first error that was held since the last call, or None."""
    first = _held[0] if _held else None
    _held.clear()
    return first


def distributed_optimizers(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    """Returns the distributed optimizers in megatron-core's chain that own parameters on this rank."""
    return [
        each
        for each in parts(optimizer)
        if isinstance(each, DistributedOptimizer) and not each.is_stub_optimizer
    ]


def keep_bucket_padding(optimizer: MegatronOptimizer) -> None:
    """Makes `fully_reshardable` optimizer checkpoints right when there are several gradient buckets.

    `get_parameter_state_dp_zero` joins the buckets without the padding between them
    (distrib_optimizer.py:1109), but `sharded_param_state_fully_reshardable` cuts the result with
    offsets that count it (:1475): every parameter after a padding gets its neighbour's moments.
    Here the padding is put back between the buckets. Test: tests/train/checkpoint/test_optimizer_state.py.
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
