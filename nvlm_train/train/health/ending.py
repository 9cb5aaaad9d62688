"""Ends a process without a collective, because other ranks may never reach one.

Exit codes of a rank: 0 finished, 1 an unexpected exception, 2 something that the user has to fix,
75 saved on a signal, 76 a hang. After 75 and 76 the same command goes on.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import NoReturn

EXIT_HANG = 76
"""A hang: the stacks of all ranks were written, and the same command goes on from the last save."""
COURTESY_S = 2.0
"""Seconds that a rank waits before it exits because of a lost peer, so that the rank that failed exits
first: torchrun orders failures by whole seconds."""

logger = logging.getLogger(__name__)


def leave(code: int) -> NoReturn:
    """Ends this process at once, without destructors, exit handlers or the end of a process group.

    Sockets close with the process, so gloo's peers get an error in the collective that they wait in.
    NCCL's peers are ended by the launcher (torchrun, `srun --kill-on-bad-exit`) or by their own
    watchdog.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def prepare() -> None:
    """Makes a crash in C code (SIGSEGV, SIGABRT, SIGBUS) print the Python stacks of all threads."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    get_error_handler().initialize()


def lost_peer(error: BaseException) -> bool:
    """Returns whether an error only says that another rank ended first."""
    return isinstance(error, RuntimeError) and any(
        sign in str(error)
        for sign in ("Connection closed by peer", "Connection reset by peer", "Connection refused")
    )


def report(error: BaseException) -> None:
    """Hands an error to torchrun, whose summary then shows the first one; does nothing without torchrun."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    try:
        raise error
    except type(error):
        # The handler stores the traceback of the exception that is being handled.
        get_error_handler().record_exception(error)
