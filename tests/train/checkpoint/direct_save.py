"""Runs on the workers: a save of an engine alone, without the run around it."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist
from megatron.core import dist_checkpointing

from nvlm_train.train.checkpoint import sharded_state
from nvlm_train.train.checkpoint.manifest import Manifest, write_manifest
from nvlm_train.train.checkpoint.mcore_fixes import keep_results_in_the_process
from nvlm_train.train.engine import Engine


def save_directly(engine: Engine, directory: Path) -> None:
    """Writes a checkpoint that `checkpoint.load` reads. Called by all ranks together."""
    if dist.get_rank() == 0:
        directory.mkdir()
    dist.barrier()
    keep_results_in_the_process()
    dist_checkpointing.save(sharded_state.sharded_state(engine), str(directory))
    if dist.get_rank() == 0:
        write_manifest(Manifest(1, {}), directory)
    dist.barrier()
