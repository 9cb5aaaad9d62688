"""Replicas exchange gradients and weights while they compute: megatron-core's DDP, made safe for our modules.

With `overlap_param_gather` an update leaves each data-parallel rank with new weights in its own share
only. They are gathered bucket by bucket during the next step's first forward pass, and a hook on every
module waits for the bucket that its own parameters lie in (distributed_data_parallel.py,
`_make_forward_pre_hook`). With `overlap_grad_reduce` a bucket of gradients is reduced as soon as the last of
them is there.

All ranks of a group must start these collectives in one order. megatron-core takes it from the modules that
a pack calls, and from the order in which autograd comes to their gradients. Both differ between our replicas,
because a text-only pack calls other modules than one with tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from torch import nn

from nvlm_train.model.zero_grads import PassedBy


class DataParallel(DistributedDataParallel):
    """Starts gathers and reductions in one order on all ranks.

    Gathers: the hook of a module that some packs pass by waits for the weights of all its parts. A text-only
    pack calls the module, but none of its parts, and would leave their buckets alone. A replica whose pack
    has tiles would wait for a gather that this one never starts, or starts behind a reduction.

    Reductions: a bucket that is ready waits until those before it have started. Buckets are in the order of a
    backward pass, so little overlap is lost.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._start = [group.start_grad_sync for group in self.bucket_groups]
        self._ready: set[int] = set()
        self._num_started = 0
        for number, group in enumerate(
            self.bucket_groups if self.ddp_config.overlap_grad_reduce else ()
        ):
            group.start_grad_sync = partial(self._start_in_order, number)

    def zero_grad_buffer(self) -> None:
        """Zeros the gradients, and forgets which buckets of the last step were reduced."""
        super().zero_grad_buffer()
        self._ready.clear()
        self._num_started = 0

    def _start_in_order(self, number: int, **options: Any) -> None:
        self._ready.add(number)
        while self._num_started in self._ready:
            self._start[self._num_started](**options)
            self._num_started += 1

    def begin_gather(self) -> None:
        """Starts the first bucket's gather, which then goes on while tiles are encoded.

        The hooks start the others, each when its neighbour before it is there: more at once would hold up
        kernels that are queued behind them where CUDA_DEVICE_MAX_CONNECTIONS is 1. Does nothing where
        weights are whole.
        """
        if self._gathers and not (first := self.bucket_groups[-1]).param_gather_dispatched:
            first.start_param_sync()

    def gather_weights(self) -> None:
        """Waits until all weights are whole. Called by all ranks, before weights are read or saved.

        A bucket that was gathered in this step is not gathered again.
        """
        if not self._gathers:
            return
        for group in reversed(self.bucket_groups):
            if group.param_gather_handle is not None or not group.param_gather_dispatched:
                group.start_param_sync(force_sync=True)

    def check_gathered(self) -> None:
        """Checks after a step's forward passes that they have gathered every bucket."""
        if self._gathers:
            assert all(
                group.param_gather_dispatched and group.param_gather_handle is None
                for group in self.bucket_groups
            ), "a module that packs may pass by is not marked as PassedBy"

    @property
    def _gathers(self) -> bool:
        return bool(self.use_forward_hook and self.bucket_groups)

    def _make_forward_pre_hook(self) -> Callable[..., None]:
        wait = super()._make_forward_pre_hook()

        def hook(module: nn.Module, *inputs: Any) -> None:
            for part in module.modules() if isinstance(module, PassedBy) else (module,):
                wait(part)

        return hook
