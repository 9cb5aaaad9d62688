"""Saves and loads weights, optimizer and RNG in megatron-core's distributed format, in any layout.

saver.py decides when to save and handles saves that fail; directory.py manages the directories.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    apply_factories,
    is_main_replica,
)
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.transformer.module import MegatronModule
from torch.distributed.checkpoint.api import CheckpointException

from nvlm_train.errors import CheckpointError
from nvlm_train.model.global_weights import sharding_metadata
from nvlm_train.parallel.topology import Topology
from nvlm_train.train.checkpoint.directory import being_read
from nvlm_train.train.checkpoint.shares import optimizer_pieces, spread_weights, weight_pieces
from nvlm_train.train.engine import Engine
from nvlm_train.train.optimizer import load_optimizer, make_moments


def write_request(engine: Engine, directory: Path, plans: Plans) -> AsyncRequest:
    """Copies what is saved, and plans a save. Called by all ranks.

    Args:
        engine: the stage.
        directory: to write into.
        plans: of this engine's saves before.

    Returns:
        The request that the writers carry out. It refers to copies alone.
    """
    state = sharded_state(engine)
    apply_factories(state)
    with engine.saves.behind_training():
        state = dict_list_map_outplace(_on_host, state)
    engine.copied = engine.saves.mark()
    request = dist_checkpointing.save(
        state,
        str(directory),
        sharded_strategy=plans.strategy,
        # torch's planner has compared all shares with the whole tensors before it was first used.
        validate_access_integrity=plans.is_new,
        async_sharded_save=True,
        preprocess_common_before_consistancy_check=_without_optimizer,
    )
    plans.is_new = False
    assert request is not None
    return request


def _on_host(value: Any) -> Any:
    """Copies a sharded tensor that this rank writes to the host's memory; returns anything else as it is.

    They are a save's only copies. megatron-core leaves alone what fills its storage, and would clone views.
    From a GPU they are on their way when this returns.
    """
    if not isinstance(value, ShardedTensor) or not is_main_replica(value.replica_id):
        return value
    copy = torch.empty(value.data.shape, dtype=value.dtype, pin_memory=value.data.is_cuda)
    return replace(value, data=copy.copy_(value.data, non_blocking=True))


class Plans:
    """What megatron-core keeps from save to save of one engine: which rank writes what, and the metadata.

    Ranks exchange plans at the first two saves. When they were equal, later ones exchange nothing.
    """

    def __init__(self) -> None:
        self.strategy = TorchDistSaveShardedStrategy("torch_dist", 1, cached_metadata=True)
        self.is_new = True


def load(engine: Engine, directory: Path, same_layout: bool) -> None:
    """Restores weights, optimizer and, in the layout that saved, the RNG.

    Each rank reads its share into place; ranks of a replica then give each other the weights.

    Args:
        engine: the built stage.
        directory: the checkpoint.
        same_layout: whether to restore the RNG.

    Raises:
        CheckpointError: the checkpoint does not fit the engine's model, or cannot be read.
    """
    state = sharded_state(engine)
    if not same_layout:
        state.pop("rng")
    loaded = _load(state, directory)
    spread_weights(engine.model.module)
    if "optimizer" in loaded:
        load_optimizer(engine.optimizer, _without_param_state(loaded["optimizer"]))
        # The groups are now those of the run that saved, with its constants.
        engine.set_learning_rate(engine.stage.optimizer.lr)
    if same_layout:
        _restore_rng(loaded["rng"])


def load_weights(module: MegatronModule, directory: Path) -> None:
    """Restores only the weights: for generation, and for a stage that starts with a new optimizer.

    Raises:
        CheckpointError: the checkpoint does not fit the model, or cannot be read.
    """
    _load({"model": _by_number(weight_pieces(module))}, directory)
    spread_weights(module)


def sharded_state(engine: Engine) -> dict[str, Any]:
    """Returns this rank's share of what is saved, as views: weights and optimizer; and its RNG."""
    module, optimizer = engine.whole_model(), engine.optimizer
    state: dict[str, Any] = {
        "model": _by_number(weight_pieces(module)),
        "rng": _rng_state(engine.topology),
    }
    # A pipeline stage without a trainable parameter has no optimizer state, and no way to ask for it.
    if optimizer.is_stub_optimizer:
        return state
    make_moments(optimizer)
    if engine.stage.parallel.distributed_optimizer:
        # Nothing, where all that a stage trains belongs to its other data-parallel ranks.
        if moments := _by_number(optimizer_pieces(optimizer, module)):
            state["moments"] = moments
        state["optimizer"] = optimizer.state_dict()
    else:
        state["optimizer"] = optimizer.sharded_state_dict(
            module.sharded_state_dict(metadata=sharding_metadata()), metadata=sharding_metadata()
        )
    return state


def _by_number(pieces: Iterable[ShardedTensor]) -> dict[str, ShardedTensor]:
    """Gives pieces keys: several may be of one tensor."""
    return {str(number): piece for number, piece in enumerate(pieces)}


def _without_param_state(state: dict[str, Any]) -> dict[str, Any]:
    """Returns an optimizer's groups; earlier formats kept its tensors with them, and said in which form."""
    return {name: value for name, value in state.items() if not name.startswith("param_state")}


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
