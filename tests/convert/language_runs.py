"""Runs on the workers: our language model with imported weights, in some layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import tensor_parallel
from torch import Tensor

from nvlm_train.config.schema import ParallelConfig
from nvlm_train.device_batch import DevicePack, DeviceRound
from nvlm_train.parallel import kernels
from nvlm_train.parallel.topology import build_topology
from nvlm_train.pipeline.placing import place_packs
from nvlm_train.pipeline.round import run_round
from nvlm_train.train.engine import Engine, build_engine
from nvlm_train.train.placing import place
from nvlm_train.train.start import initial_weights
from nvlm_train.train.step import run_step
from tests.parity import recipes
from tests.parity.gradients import gather


def import_engine(parallel: ParallelConfig, weights: Path, **fields: Any) -> Engine:
    """The small model whose language part comes from `weights`, with a family's fields of the recipe."""
    recipe = recipes.recipe(parallel)
    language = replace(recipe.model.language, weights=str(weights), **fields)
    recipe = replace(recipe, model=replace(recipe.model, language=language))
    engine = build_engine(
        recipe, recipe.stages["sft"], build_topology(parallel, recipe.seed), kernels.detect()
    )
    initial_weights(recipe, engine.model.module)
    engine.model.eval()
    # What reads the weights outside of a step asks for them; some tests run packs on one replica alone.
    engine.whole_model()
    return engine


def logits_of(
    parallel: ParallelConfig, weights: Path, layouts: list, **fields: Any
) -> list[Tensor]:
    """Logits [S, V] of text-only packs, on the ranks of the last pipeline stage."""
    engine = import_engine(parallel, weights, **fields)
    (round_,) = recipes.step_batch(layouts, engine.topology.share, 0).rounds
    everywhere = [np.arange(len(each.token_ids_S)) for each in round_.microbatches]
    packs = place_packs(round_.microbatches, everywhere)
    placed = DeviceRound(packs, round_.tile_split, round_.pixels_TCEE, relayed=0)

    def finish(pack: DevicePack, logits: Tensor) -> tuple[Tensor, Tensor]:
        whole = tensor_parallel.gather_from_tensor_model_parallel_region(logits[:, 0])
        return logits.sum(), whole.detach().clone()

    with torch.no_grad():
        return run_round(engine.replica, placed, finish, forward_only=True)


def losses_of_steps(
    parallel: ParallelConfig, weights: Path, steps: int, **fields: Any
) -> list[float]:
    """Losses of training steps on packs with images and text, from imported weights."""
    engine = import_engine(parallel, weights, **fields)
    engine.model.train()
    engine.reload_optimizer_weights()
    return [
        run_step(
            engine,
            place(
                recipes.step_batch(recipes.MIXED, engine.topology.share, number), engine.topology
            ),
            num_sources=2,
        ).loss
        for number in range(steps)
    ]


def whole_weights(parallel: ParallelConfig, weights: Path) -> dict[str, Tensor]:
    """Canonical tensors after the import."""
    return gather(import_engine(parallel, weights), lambda parameter: parameter.data)
