"""Work that rank 0 does for all: its result or its failure reaches every rank, so that none waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from nvlm_train.errors import CheckpointError

T = TypeVar("T")


def on_rank_0(action: Callable[[], T]) -> T:
    """Runs `action` on rank 0 and gives its result to every rank. Called by all ranks together.

    Raises:
        CheckpointError: on every rank, when the file system or a checkpoint failed rank 0.
    """
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = action()
        except (OSError, CheckpointError) as error:
            answer[1] = str(error)
    dist.broadcast_object_list(answer, src=0)
    result, failure = answer
    if failure is not None:
        raise CheckpointError(failure)
    return result  # type: ignore[no-any-return]
