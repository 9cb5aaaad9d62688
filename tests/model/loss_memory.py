"""Runs on a worker: the most bytes that loss and gradients of 2,048 trained tokens take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nvlm_train.config.schema import ParallelConfig
from nvlm_train.model.build import DTYPES
from nvlm_train.model.output.token_losses import VocabularyShard, token_losses
from nvlm_train.parallel.topology import build_topology

TOKENS, ROWS, HIDDEN = 2048, 151_936, 1536


class StorageCount(TorchDispatchMode):
    """Counts the bytes of storages that were made inside of it and are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._known: dict[StorageWeakRef, int] = {}
        self._before: list[StorageWeakRef] = []

    def leave_out(self, *tensors: Tensor) -> None:
        """Does not count what was there before."""
        self._before += [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        self._known = {ref: size for ref, size in self._known.items() if not ref.expired()}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                ref = StorageWeakRef(tensor.untyped_storage())
                if ref not in self._before:
                    self._known[ref] = tensor.untyped_storage().nbytes()
        self.most = max(self.most, sum(self._known.values()))
        return result


def peaks(precision: str, tensor: int) -> tuple[int, int]:
    """Returns the peaks in chunks and of all logits at once, for the rows of one of `tensor` ranks."""
    build_topology(ParallelConfig(), 0)
    group = dist.group.WORLD
    assert group is not None
    shard = VocabularyShard(0, ROWS // tensor, group, fuses_gradient=True)
    return _peak(precision, shard, in_chunks=True), _peak(precision, shard, in_chunks=False)


def peaks_on_cuda(precision: str) -> tuple[int, int]:
    """Returns the same peaks by CUDA's allocator, past a first call that compiles."""
    build_topology(ParallelConfig(), 0)
    group = dist.group.WORLD
    assert group is not None
    shard = VocabularyShard(0, ROWS, group, fuses_gradient=True)
    found = []
    for in_chunks in (True, False):
        problem = _Problem.on("cuda", precision, shard)
        problem.run(in_chunks)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        problem.run(in_chunks)
        found.append(torch.cuda.max_memory_allocated() - before)
    return found[0], found[1]


def _peak(precision: str, shard: VocabularyShard, in_chunks: bool) -> int:
    problem = _Problem.on("meta", precision, shard)
    count = StorageCount()
    count.leave_out(problem.hidden, problem.table, problem.labels, problem.main_grad)
    with count:
        problem.run(in_chunks)
    return count.most


@dataclass(frozen=True)
class _Problem:
    hidden: Tensor
    table: Tensor
    labels: Tensor
    main_grad: Tensor
    shard: VocabularyShard

    @classmethod
    def on(cls, device: str, precision: str, shard: VocabularyShard) -> _Problem:
        dtype = DTYPES[precision]
        hidden = torch.zeros(TOKENS, 1, HIDDEN, dtype=dtype, device=device, requires_grad=True)
        table = torch.nn.Parameter(torch.zeros(shard.rows, HIDDEN, dtype=dtype, device=device))
        labels = torch.zeros(TOKENS, dtype=torch.int64, device=device)
        table.main_grad = torch.zeros(shard.rows, HIDDEN, device=device)  # type: ignore[attr-defined]
        return cls(hidden, table, labels, table.main_grad, shard)  # type: ignore[attr-defined]

    def run(self, in_chunks: bool) -> None:
        self.hidden.grad = self.table.grad = None
        if in_chunks:
            # megatron-core's own placeholder for autograd is left out of its peak.
            self.table.grad_added_to_main_grad = False  # type: ignore[attr-defined]
            losses = token_losses(self.hidden.squeeze(1), self.table, self.labels, self.shard)
        else:
            losses = _at_once(self.hidden, self.table, self.labels)
        (losses.sum() / TOKENS).backward()


def _at_once(hidden: Tensor, table: Tensor, labels: Tensor) -> Tensor:
    from megatron.core.tensor_parallel.layers import (
        linear_with_grad_accumulation_and_async_allreduce as linear,
    )

    logits = linear(
        hidden,
        table,
        bias=None,
        gradient_accumulation_fusion=True,
        allreduce_dgrad=False,
        sequence_parallel=False,
    )
    return vocab_parallel_cross_entropy(logits.float(), labels[:, None])  # type: ignore[no-any-return]
