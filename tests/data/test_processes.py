"""Worker processes: one that is killed ends the command with a message, not a traceback."""

from __future__ import annotations

import os
import signal

import pytest

from nvlm_train.data.processes import processes
from nvlm_train.errors import ShardError


def start() -> None:
    pass


def die(number: int) -> int:
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_killed_worker_is_explained() -> None:
    with (
        pytest.raises(
            ShardError, match=r"a worker was killed .*; run the same command again, with"
        ),
        processes(2, start) as pool,
    ):
        list(pool.map(die, range(5)))
