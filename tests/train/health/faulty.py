"""Runs `nvlm train` so that one rank really fails.

`python -m tests.train.health.faulty KIND RANK STEP OVERRIDE ...`

KIND: `sleep` for ever, `freeze` in C code that keeps the interpreter lock, `raise` an error of nobody's,
`memory` leaves the rank no more address space, `segv` crashes, `none` does nothing.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import time
from collections.abc import Callable

import psutil

from nvlm_train.cli import main
from nvlm_train.train.engine import Engine
from tests.train.health.ills import before_steps


def _freeze() -> None:
    # A PyDLL's functions are called without letting go of the interpreter lock.
    ctypes.PyDLL(None).sleep(3600)


def _raise() -> None:
    raise KeyError("a bug of ours")


def _take_memory() -> None:
    import torch

    now = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (now + 2**26, now + 2**26))
    torch.zeros(2**30)


KINDS: dict[str, Callable[[], None]] = {
    "none": lambda: None,
    "sleep": lambda: time.sleep(3600),
    "freeze": _freeze,
    "raise": _raise,
    "memory": _take_memory,
    "segv": lambda: os.kill(os.getpid(), signal.SIGSEGV),
}


def fail(kind: str, rank: int, step: int, overrides: list[str]) -> int:
    """Trains. Returns the exit code."""

    def ill(engine: Engine, number: int) -> None:
        if number == step and int(os.environ.get("RANK", "0")) == rank:
            KINDS[kind]()

    with before_steps(ill):
        return main(["train", *overrides])


if __name__ == "__main__":
    sys.exit(fail(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]))
