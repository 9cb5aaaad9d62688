"""Handles SIGTERM and SIGUSR1: finish the step, save, exit with a code that means "start me again"."""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist

from nvlm_train.parallel.topology import device

EXIT_REQUEUE = 75
"""BSD's EX_TEMPFAIL: the run was saved and is not finished; the same command goes on."""

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Remembers a signal on any rank until all ranks can act on it together."""

    def __init__(self) -> None:
        self._received = 0
        for number in _SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._received = number

    def agreed(self) -> bool:
        """Returns whether some rank got a signal, by one small all-reduce.

        Called by every rank after every step.
        """
        flag = torch.tensor(self._received, dtype=torch.int32, device=device())
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)
