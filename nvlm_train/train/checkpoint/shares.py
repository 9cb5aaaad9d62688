"""Which numbers of weights and optimizer a rank saves and reads: its share, and no other rank's.

Data-parallel ranks hold the same weights; each saves a range of the numbers that its tensor-parallel rank and
pipeline stage hold. Of the optimizer each has a range anyway: what megatron-core's distributed optimizer gave
it. Both are saved as rectangles of whole tensors under the names of `fully_reshardable`, which gathered
the optimizer on every rank (megatron-core, distrib_optimizer.py:1404).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from nvlm_train.model.global_weights import shards_by_parameter
from nvlm_train.train.checkpoint.rectangles import rectangles
from nvlm_train.train.optimizer import parts

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Share:
    """A range of the numbers of a tensor that this rank holds."""

    shard: ShardedTensor
    """The tensor, and where in the whole one it lies."""
    start: int
    """In the flattened tensor."""
    stop: int

    @property
    def numbers(self) -> Tensor:
        """A view of them."""
        return self.shard.data.view(-1)[self.start : self.stop]

    def pieces(self, name: str, numbers: Tensor) -> Iterator[ShardedTensor]:
        """Says where numbers in place of these lie in a whole tensor of the same shape.

        Args:
            name: of the whole tensor.
            numbers: as many, flat, of any dtype. Pieces are views of them.
        """
        for each in rectangles(tuple(self.shard.local_shape), self.start, self.stop):
            data = numbers[each.start - self.start : each.stop - self.start].view(each.size)
            places = zip(self.shard.global_offset, each.offset, strict=True)
            yield ShardedTensor(
                key=name,
                data=data,
                dtype=data.dtype,
                local_shape=each.size,
                global_shape=self.shard.global_shape,
                global_offset=tuple(own + inside for own, inside in places),
                axis_fragmentations=None,
                # The last number counts data-parallel ranks, which all have other numbers.
                replica_id=(*self.shard.replica_id[:-1], 0),  # type: ignore[misc]
            )


def weight_pieces(model: MegatronModule) -> Iterator[ShardedTensor]:
    """Yields this rank's share of the weights, as views."""
    group = mpu.get_data_parallel_group()
    for share in shares(_shards(model), group.rank(), group.size()):
        yield from share.pieces(share.shard.key, share.numbers)


def spread_weights(model: MegatronModule) -> None:
    """Gives all data-parallel ranks the weights of which each has read its share."""
    group = mpu.get_data_parallel_group()
    if group.size() == 1:
        return
    everything = _shards(model)
    for rank in range(group.size()):
        for share in shares(everything, rank, group.size()):
            dist.broadcast(share.numbers, dist.get_global_rank(group, rank), group)


def optimizer_pieces(
    optimizer: MegatronOptimizer, model: MegatronModule
) -> Iterator[ShardedTensor]:
    """Yields what this rank's distributed optimizers keep, as views: moments, and fp32 copies of weights.

    Where the optimizer works on the weights themselves, in fp32, they are not saved twice.
    """
    by_parameter = shards_by_parameter(model)
    for each in distributed_optimizers(optimizer):
        for owned in owned_ranges(each):
            states = _states(each, owned.parameter)
            for share in owned.shares(by_parameter[owned.parameter]):
                begin = share.start + _offset(share.shard, owned.parameter) - owned.start
                for kind, state in states.items():
                    name = f"optimizer.state.{kind}.{share.shard.key}"
                    numbers = state[begin : begin + share.stop - share.start]
                    yield from share.pieces(name, numbers)


def distributed_optimizers(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    """Returns the distributed optimizers in megatron-core's chain that own parameters on this rank."""
    return [
        each
        for each in parts(optimizer)
        if isinstance(each, DistributedOptimizer) and not each.is_stub_optimizer
    ]


def shares(shards: Sequence[ShardedTensor], rank: int, size: int) -> Iterator[Share]:
    """Cuts tensors, laid one behind the other, into as many equal ranges as there are ranks.

    Args:
        shards: what every one of the ranks holds, in one order.
        rank: whose range it is.
        size: ranks.
    """
    total = sum(shard.data.numel() for shard in shards)
    first, last = total * rank // size, total * (rank + 1) // size
    begin = 0
    for shard in shards:
        count = shard.data.numel()
        start, stop = max(first - begin, 0), min(last - begin, count)
        if start < stop:
            yield Share(shard, start, stop)
        begin += count


@dataclass(frozen=True)
class OwnedRange:
    """The range of a parameter's numbers that this rank's distributed optimizer updates."""

    parameter: nn.Parameter
    start: int
    """In the flattened parameter."""
    stop: int

    def shares(self, shards: Sequence[ShardedTensor]) -> Iterator[Share]:
        """Yields its parts in the tensors that the parameter consists of: gate and up are two."""
        for shard in shards:
            begin = _offset(shard, self.parameter)
            start, stop = max(self.start - begin, 0), min(self.stop - begin, shard.data.numel())
            if start < stop:
                yield Share(shard, start, stop)


def owned_ranges(optimizer: DistributedOptimizer) -> Iterator[OwnedRange]:
    """Yields the ranges of a distributed optimizer (distrib_optimizer.py:112)."""
    for buffer in optimizer.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield OwnedRange(parameter, ranges["param"].start, ranges["param"].end)


def _states(optimizer: DistributedOptimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Returns the flat states of the numbers that the optimizer owns of a parameter."""
    group, place = optimizer.model_param_group_index_map[parameter]
    main = optimizer.optimizer.param_groups[group]["params"][place]
    state = optimizer.optimizer.state[main]
    found = {kind: state[kind].detach() for kind in MOMENTS}
    if main.untyped_storage().data_ptr() != parameter.untyped_storage().data_ptr():
        found["param"] = main.detach()
    return found


def _shards(model: MegatronModule) -> list[ShardedTensor]:
    return [shard for shards in shards_by_parameter(model).values() for shard in shards]


def _offset(shard: ShardedTensor, parameter: nn.Parameter) -> int:
    """Returns where in a flattened parameter one of its tensors begins."""
    offset: int = shard.data.storage_offset() - parameter.storage_offset()
    return offset
