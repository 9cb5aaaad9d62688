"""`nvlm train`: runs a recipe. A rank that fails ends without waiting for the others."""

from __future__ import annotations

import gc
import logging
import os
import time
import traceback

from torch.distributed.checkpoint.api import CheckpointException

from nvlm_train.config.schema import Recipe
from nvlm_train.errors import NvlmError
from nvlm_train.train.health import ending
from nvlm_train.train.loop import train

logger = logging.getLogger(__name__)

EXIT_UNEXPECTED = 1
"""Exit code of an unexpected error; the log has its traceback."""


def run(recipe: Recipe) -> int:
    """Trains, and returns the exit code.

    Raises:
        NvlmError: an error that the user can fix, in a run of one process. In a larger world a rank
            that fails logs why and ends at once: the interpreter's exit would wait in collectives for
            ranks that wait for this one.
    """
    ending.prepare()
    try:
        code = train(recipe)
        # The interpreter's exit collects garbage several times (1.5 s of a rank's time). The collector
        # does not look at frozen objects.
        gc.freeze()
        return code
    # Whatever the error is, this rank must not stay. The error is logged in full, and the exit code says
    # that there was one. (torch's CheckpointException derives from BaseException.)
    except (Exception, CheckpointException) as error:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            raise
        code = _log_error(error)
        if ending.lost_peer(error):
            # The rank that failed must exit first: launchers report the exit code of the first to exit.
            time.sleep(ending.COURTESY_S)
        else:
            ending.report(error)
        ending.leave(code)


def _log_error(error: BaseException) -> int:
    """Logs why this rank ends. Returns its exit code."""
    if isinstance(error, NvlmError):
        logger.error("%s: %s", type(error).__name__, error)
        return 2
    if ending.lost_peer(error):
        logger.error(
            "another rank ended while this one waited for it; its own message says why "
            "(torchrun shows the first failure last)"
        )
        return EXIT_UNEXPECTED
    logger.error(
        "an unexpected error ends this rank:\n%s", "".join(traceback.format_exception(error))
    )
    return EXIT_UNEXPECTED
