"""Logging, set up once a process: rank 0 speaks, the others warn."""

from __future__ import annotations

import logging
import os
import sys

_FORMAT = "%(asctime)s %(levelname).1s {rank}%(name)s: %(message)s"


def set_up_logging(rank: int | None = None, world_size: int | None = None) -> None:
    """Sends records to stderr in one format; rank 0 from INFO on, the others from WARNING on.

    Calling it again replaces the handler of the earlier call.

    Args:
        rank: defaults to the launcher's RANK, 0 without one.
        world_size: defaults to the launcher's WORLD_SIZE; ranks are named when it is above 1.
    """
    rank = int(os.environ.get("RANK", "0")) if rank is None else rank
    world_size = int(os.environ.get("WORLD_SIZE", "1")) if world_size is None else world_size
    handler = logging.StreamHandler(sys.stderr)
    prefix = f"[rank {rank}] " if world_size > 1 else ""
    handler.setFormatter(logging.Formatter(_FORMAT.format(rank=prefix), datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("nvlm_train").setLevel(logging.INFO if rank == 0 else logging.WARNING)
