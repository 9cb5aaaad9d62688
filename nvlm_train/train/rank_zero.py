"""Work that rank 0 does for all: its result or its failure reaches every rank, so that none waits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from nvlm_train.errors import CheckpointError

T = TypeVar("T")


@dataclass(frozen=True)
class _Outcome:
    """Holds what the action returned, or why it failed."""

    result: Any = None
    failure: CheckpointError | None = None


def on_rank_0(action: Callable[[], T]) -> T:
    """Runs `action` on rank 0 and gives its result to every rank. Called by all ranks together.

    Raises:
        CheckpointError: on every rank, when the file system or a checkpoint failed on rank 0. The
            class is the one that rank 0 raised, such as FormatError.
    """
    shared = [_run(action) if dist.get_rank() == 0 else _Outcome()]
    dist.broadcast_object_list(shared, src=0)
    (outcome,) = shared
    if outcome.failure is not None:
        raise outcome.failure
    return outcome.result  # type: ignore[no-any-return]


def _run(action: Callable[[], Any]) -> _Outcome:
    try:
        return _Outcome(action())
    except CheckpointError as error:
        return _Outcome(failure=error)
    except OSError as error:
        return _Outcome(failure=CheckpointError(str(error)))
