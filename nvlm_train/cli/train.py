"""`nvlm train`: runs a recipe, and ends a rank without waiting for the others when it fails."""

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
"""An error that nobody expected; the traceback is above."""


def run(recipe: Recipe) -> int:
    """Trains. Returns the exit code.

    Raises:
        NvlmError: the user's to fix, in a run of one process. In a larger world a rank that fails
            says why and ends at once: interpreter exit would wait in collectives for ranks that wait for it.
    """
    ending.prepare()
    try:
        code = train(recipe)
        # The interpreter's exit collects garbage several times over all that is alive (1.5 s of a rank's
        # time); what is frozen, it does not look at.
        gc.freeze()
        return code
    # Whatever it is, this rank must not stay: it is told in full, and the exit code says so. (torch's
    # CheckpointException derives from BaseException.)
    except (Exception, CheckpointException) as error:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            raise
        code = _tell(error)
        if ending.lost_peer(error):
            # The rank that failed goes first: launchers take the exit code of the first one to leave.
            time.sleep(ending.COURTESY_S)
        else:
            ending.report(error)
        ending.leave(code)


def _tell(error: BaseException) -> int:
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
