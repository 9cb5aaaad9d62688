"""Runs on the workers: how often the host reads a tensor, or waits for the device, in a step.

On a CPU a read costs nothing; on a GPU each one waits for all work that is queued. So they are counted here.
"""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nvlm_train.config.schema import ParallelConfig
from nvlm_train.model.attention.joined import JoinedSelfAttention
from nvlm_train.model.pack import Pack
from nvlm_train.train.placing import place
from nvlm_train.train.step import run_step
from tests.parity import cross_gradients, cross_recipes

READS = {
    Tensor.item: "item",
    Tensor.tolist: "tolist",
    Tensor.__int__: "int",
    Tensor.__float__: "float",
    Tensor.__bool__: "bool",
    Tensor.__index__: "index",
    Tensor.__contains__: "in",
    Tensor.nonzero: "nonzero",
    torch.nonzero: "nonzero",
    torch.equal: "equal",
    Tensor.equal: "equal",
    torch.unique: "unique",
    Tensor.unique: "unique",
    torch.masked_select: "masked_select",
    Tensor.masked_select: "masked_select",
}
"""Calls whose result the host, or a shape, depends on."""


class HostReads(TorchFunctionMode):
    """Counts them while it is entered, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = READS.get(function)
        if name is None and function is Tensor.__getitem__ and _is_mask(args[1]):
            name = "mask"
        if name is not None:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))

    def __enter__(self) -> HostReads:
        def synchronize(*args: object) -> None:
            self.counts["synchronize"] += 1

        self._patch = mock.patch.object(torch.cuda, "synchronize", synchronize)
        self._patch.start()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.stop()


def _is_mask(index: Any) -> bool:
    """A boolean index has a result whose length the device knows."""
    each = index if isinstance(index, tuple) else (index,)
    return any(isinstance(one, Tensor) and one.dtype == torch.bool for one in each)


def of_a_step(
    name: str, parallel: ParallelConfig, packs: int, rounds: int, **changes: object
) -> dict[str, int]:
    """Counts the reads of the second step of a run.

    Args:
        name: of `cross_recipes.ALL`.
        parallel: the layout.
        packs: of the step on each replica.
        rounds: into which they are cut.
        changes: to the recipe.
    """
    engine = cross_gradients.start_engine(name, parallel, **changes)
    for number in range(2):
        layouts = [
            cross_recipes.MIXED[n % len(cross_recipes.MIXED)]
            for n in range(packs * engine.topology.data_size)
        ]
        batch = cross_recipes.step_batch(name, layouts, engine.topology.share, number, rounds)
        placed = place(batch, engine.topology)
        with HostReads() as reads:
            run_step(engine, placed, num_sources=2)
    return dict(reads.counts)


def of_a_step_with_bug(name: str, packs: int) -> dict[str, int]:
    """Counts the reads when every attention reads the segments' bounds from the device."""
    original = JoinedSelfAttention.forward

    def broken(self: Any, *args: Any, packed_seq_params: Pack, **others: Any) -> Any:
        torch.tensor(packed_seq_params.lengths).cumsum(0).tolist()
        return original(self, *args, packed_seq_params=packed_seq_params, **others)

    with mock.patch.object(JoinedSelfAttention, "forward", broken):
        return of_a_step(name, ParallelConfig(), packs, 1)
