"""Runs on the workers: initial weights of a layout, their fingerprint, and one damaged weight."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from nvlm_train.config.schema import ParallelConfig
from nvlm_train.errors import CheckpointError
from nvlm_train.model import global_weights
from nvlm_train.parallel import kernels
from nvlm_train.parallel.topology import build_topology
from nvlm_train.train.engine import Engine, build_engine
from nvlm_train.train.start import initial_weights
from tests.parity import recipes
from tests.parity.gradients import gather


def weights_and_fingerprint(
    parallel: ParallelConfig,
) -> tuple[dict[str, Tensor], dict[str, float], list[str]]:
    """Whole weights, their sums, and what check_fingerprint says before and after one changes."""
    recipe = recipes.recipe(parallel)
    topology = build_topology(parallel, recipe.seed)
    engine = build_engine(recipe, recipe.stages["sft"], topology, kernels.detect())
    module = engine.model.module
    initial_weights(recipe, module)
    whole = gather(engine, lambda parameter: parameter.data)
    saved = global_weights.fingerprint(module)
    messages = [_message(engine, saved)]
    last = dist.get_world_size() - 1
    if dist.get_rank() == last:
        with torch.no_grad():
            # Sharded over tensor-parallel ranks: nobody else holds this one.
            module.language_model.decoder.layers[0].mlp.linear_fc1.weight[0, 0] += 1e-4
    messages.append(_message(engine, saved))
    return whole, saved, messages


def _message(engine: Engine, saved: dict[str, float]) -> str:
    try:
        global_weights.check_fingerprint(engine.model.module, saved)
    except CheckpointError as error:
        return str(error)
    return ""
