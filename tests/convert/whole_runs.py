"""Runs on the workers: a model whose three parts come out of a whole NVLM-D, in some layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from nvlm_train.config.model_schema import ModelConfig
from nvlm_train.config.schema import ParallelConfig
from nvlm_train.parallel import kernels
from nvlm_train.parallel.topology import build_topology
from nvlm_train.train.engine import build_engine
from nvlm_train.train.placing import place
from nvlm_train.train.start import initial_weights
from nvlm_train.train.step import run_step
from tests.parity import recipes
from tests.parity.gradients import gather
from tests.parity.recipes import MODEL


def model_from(directory: Path) -> ModelConfig:
    """The small model, every part of it out of one directory."""
    weights = str(directory)
    return replace(
        MODEL,
        vision=replace(MODEL.vision, weights=weights),
        projector=replace(MODEL.projector, weights=weights),
        language=replace(MODEL.language, weights=weights),
    )


def start_of(
    parallel: ParallelConfig, directory: Path, tiles_TCEE: Tensor
) -> tuple[dict[str, Tensor], Tensor, list[float]]:
    """Whole tensors by global name, the features of tiles, and the losses of two steps."""
    recipe = recipes.recipe(parallel, model=model_from(directory))
    topology = build_topology(parallel, recipe.seed)
    engine = build_engine(recipe, recipe.stages["sft"], topology, kernels.detect())
    initial_weights(recipe, engine.model.module)
    engine.reload_optimizer_weights()
    whole = gather(engine, lambda parameter: parameter.data)
    features = engine.encoder(tiles_TCEE)
    losses = [
        run_step(
            engine,
            place(recipes.step_batch(recipes.MIXED, topology.share, number), topology),
            num_sources=2,
        ).loss
        for number in range(2)
    ]
    return whole, features, losses


def projected(directory: Path, tiles_TCEE: Tensor) -> Tensor:
    """What the language model sees of tiles, [T, tokens, H], in one process."""
    recipe = recipes.recipe(ParallelConfig(), model=model_from(directory))
    topology = build_topology(ParallelConfig(), recipe.seed)
    engine = build_engine(recipe, recipe.stages["sft"], topology, kernels.detect())
    initial_weights(recipe, engine.model.module)
    with torch.no_grad():
        features = engine.encoder(tiles_TCEE)
        return engine.model.module.projector(features.flatten(0, 1)).unflatten(
            0, features.shape[:2]
        )
