"""Runs on the workers: a model with tied embeddings, and both copies of its table."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from nvlm_train.config.schema import ParallelConfig
from nvlm_train.train.engine import Engine
from nvlm_train.train.placing import place
from nvlm_train.train.step import run_step
from tests.parity import gradients, recipes

MODEL = replace(recipes.MODEL, language=replace(recipes.LANGUAGE, tied_embeddings=True))


def copies_after_steps(parallel: ParallelConfig, steps: int) -> list[Tensor]:
    """The first data-parallel replica's copies, whole, the first pipeline stage's first."""
    engine = gradients.start_engine(parallel, model=MODEL)
    return _copies(engine, steps)


def copies_without_a_sum(parallel: ParallelConfig, steps: int) -> list[Tensor]:
    """The same with a deliberate bug: megatron-core does not hear that tables are shared."""
    engine = gradients.start_engine(parallel, model=MODEL)
    engine.model.module.share_embeddings_and_output_weights = False
    return _copies(engine, steps)


def _copies(engine: Engine, steps: int) -> list[Tensor]:
    for number in range(steps):
        batch = recipes.step_batch(recipes.MIXED, engine.topology.share, number)
        run_step(engine, place(batch, engine.topology), num_sources=2)
    topology, module = engine.topology, engine.whole_model()
    own = None
    if (topology.is_first_pp_stage or topology.is_last_pp_stage) and topology.data_rank == 0:
        stage = 0 if topology.is_first_pp_stage else 1
        own = (stage, topology.tensor_rank, module.shared_embedding_or_output_weight().detach())
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    slices = sorted((each for each in everyone if each is not None), key=lambda each: each[:2])
    stages = sorted({stage for stage, _, _ in slices})
    return [torch.cat([part for at, _, part in slices if at == stage]) for stage in stages]
