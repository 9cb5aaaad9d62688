"""Saves and loads weights, optimizer and RNG in megatron-core's distributed format, in any layout.

saver.py decides when to save and handles saves that fail; directory.py manages the directories.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.transformer.module import MegatronModule
from torch.distributed.checkpoint.api import CheckpointException

from nvlm_train.errors import CheckpointError
from nvlm_train.model.global_weights import sharding_metadata
from nvlm_train.parallel.topology import Topology
from nvlm_train.train.checkpoint.directory import being_read
from nvlm_train.train.checkpoint.mcore_fixes import keep_bucket_padding
from nvlm_train.train.engine import Engine
from nvlm_train.train.optimizer import load_optimizer, make_moments

_EXTRA_STATE = "_extra_state"


def write_request(engine: Engine, directory: Path) -> AsyncRequest:
    """Plans a save. Returns the request that the writers carry out. Called by all ranks."""
    # megatron-core collects garbage here (distrib_optimizer.py:1283). Over all objects that are alive by
    # now this took longer than a step; the collector does not look at frozen objects.
    gc.freeze()
    try:
        request = dist_checkpointing.save(
            sharded_state(engine, is_loading=False),
            str(directory),
            async_sharded_save=True,
            preprocess_common_before_consistancy_check=_without_optimizer,
        )
    finally:
        gc.unfreeze()
    assert request is not None
    return request


def load(engine: Engine, directory: Path, same_layout: bool) -> None:
    """Restores weights, optimizer and, in the layout that saved, the RNG.

    Args:
        engine: the built stage.
        directory: the checkpoint.
        same_layout: whether to restore the RNG.

    Raises:
        CheckpointError: the checkpoint does not fit the engine's model, or cannot be read.
    """
    state = sharded_state(engine, is_loading=True)
    if not same_layout:
        state.pop("rng")
    loaded = _load(state, directory)
    _set_weights(engine.model.module, loaded["model"], directory)
    if "optimizer" in loaded:
        load_optimizer(engine.optimizer, loaded["optimizer"])
        # The groups are now those of the run that saved, with its constants.
        engine.set_learning_rate(engine.stage.optimizer.lr)
    if same_layout:
        _restore_rng(loaded["rng"])


def load_weights(module: MegatronModule, directory: Path) -> None:
    """Restores only the weights: for generation, and for a stage that starts with a new optimizer.

    Raises:
        CheckpointError: the checkpoint does not fit the model, or cannot be read.
    """
    loaded = _load({"model": _sharded_weights(module)}, directory)
    _set_weights(module, loaded["model"], directory)


def sharded_state(engine: Engine, is_loading: bool) -> dict[str, Any]:
    """Returns what is saved: weights, optimizer and RNG, each with its place in the whole model."""
    weights = _sharded_weights(engine.whole_model())
    state: dict[str, Any] = {"model": weights, "rng": _rng_state(engine.topology)}
    # A pipeline stage without a trainable parameter has no optimizer state, and no way to ask for it.
    if not engine.optimizer.is_stub_optimizer:
        keep_bucket_padding(engine.optimizer)
        make_moments(engine.optimizer)
        metadata = {"distrib_optim_sharding_type": "fully_reshardable", **sharding_metadata()}
        state["optimizer"] = engine.optimizer.sharded_state_dict(
            _sharded_weights(engine.model.module), is_loading=is_loading, metadata=metadata
        )
    return state


def _sharded_weights(module: MegatronModule) -> dict[str, Any]:
    """Returns the parameters without what one kernel library's modules add to them.

    Transformer Engine's modules add the scales of FP8 (`_extra_state`), which bf16 and fp32 do not
    need. With them a checkpoint could be read only by the kernels that wrote it.
    """
    state = module.sharded_state_dict(metadata=sharding_metadata())
    return {name: value for name, value in state.items() if not name.endswith(_EXTRA_STATE)}


def _set_weights(module: MegatronModule, state: dict[str, Any], directory: Path) -> None:
    missing, unexpected = module.load_state_dict(state, strict=False)
    wrong = [name for name in (*missing, *unexpected) if not name.endswith(_EXTRA_STATE)]
    if wrong:
        raise CheckpointError(
            f"{directory} does not fit the recipe's model: {len(wrong)} tensors are missing or too many, "
            f"the first is {wrong[0]}"
        )


def _load(state: dict[str, Any], directory: Path) -> dict[str, Any]:
    from megatron.core.dist_checkpointing.core import CheckpointingException

    try:
        with being_read(directory):
            loaded: dict[str, Any] = dist_checkpointing.load(state, str(directory))
    except CheckpointingException as error:
        raise CheckpointError(f"{directory} does not fit the recipe's model: {error}") from error
    # CheckpointException is torch's and derives from BaseException: some rank could not read its shards.
    except (CheckpointException, OSError) as error:
        raise CheckpointError(f"{directory} cannot be read: {reason(error)}") from error
    return loaded


def reason(error: BaseException) -> str:
    """Returns why a save or a load failed, in one line. On rank 0 torch knows what happened on each rank."""
    if isinstance(error, CheckpointException):
        by_rank = [f"rank {rank}: {cause}" for rank, (cause, _) in sorted(error.failures.items())]
        return "; ".join(by_rank)
    return str(error)


def _rng_state(topology: Topology) -> ShardedObject:
    data = {
        "torch": torch.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    if torch.cuda.is_available():
        data["cuda"] = torch.cuda.get_rng_state()
    grid = (topology.pipeline_size, topology.tensor_size, topology.data_size)
    place = (topology.pipeline_rank, topology.tensor_rank, topology.data_rank)
    return ShardedObject("rng", data, grid, place)


def _restore_rng(data: dict[str, Any]) -> None:
    torch.set_rng_state(data["torch"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(data["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(data["tracker"])


def _without_optimizer(common: dict[str, Any]) -> dict[str, Any]:
    """Returns what megatron-core may compare between ranks: not every pipeline stage has an optimizer."""
    return {key: value for key, value in common.items() if key != "optimizer"}
