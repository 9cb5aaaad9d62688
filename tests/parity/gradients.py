"""Runs on the workers: one step or several in a layout, and the canonical gradients gathered from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nvlm_train.batch import StepBatch
from nvlm_train.config.schema import ParallelConfig
from nvlm_train.model import global_weights
from nvlm_train.parallel import kernels
from nvlm_train.parallel.topology import build_topology
from nvlm_train.train import step as step_module
from nvlm_train.train.engine import Engine, build_engine
from nvlm_train.train.placing import place
from nvlm_train.train.reduce_metrics import count_trained_tokens, reduce_step
from nvlm_train.vision.tile_parallel import encode_round
from tests.parity import recipes

Gradients = list[dict[str, Tensor]]
"""By step, whole tensors by canonical name."""

GATE = 0.5
"""Gates away from zero, so that the cross path carries gradient."""


def start_engine(parallel: ParallelConfig, **changes: object) -> Engine:
    """Builds the small model in some layout, with weights that depend on names only."""
    recipe = recipes.recipe(parallel, **changes)
    topology = build_topology(parallel, recipe.seed)
    engine = build_engine(recipe, recipe.stages["sft"], topology, kernels.detect())
    seeded = global_weights.seeded_source(recipe.model.language, recipe.seed)

    def source(name: str, shape: tuple[int, ...]) -> Tensor:
        if name.endswith("alpha"):
            return torch.full(shape, GATE)
        # Norms and biases away from one and zero, so that their gradients are tested too.
        if "norm" in name or name.endswith("bias"):
            offset = 1.0 if name.endswith("weight") else 0.0
            return offset + 0.2 * seeded(name.replace("norm", "n").replace("bias", "b"), shape)
        return seeded(name, shape)

    global_weights.fill(engine.model.module, global_weights.cut(source))
    engine.reload_optimizer_weights()
    return engine


def gather(engine: Engine, of: Callable[[torch.nn.Parameter], Tensor | None]) -> dict[str, Tensor]:
    """Returns whole tensors by canonical name, joined from every rank's slices (on rank 0 of DP only)."""
    own = [
        (
            shard.key,
            tuple(shard.global_shape),
            tuple(shard.global_offset),
            shard.data.to("cpu", copy=True),
        )
        for shard in global_weights.shards(engine.model.module, of)
    ]
    everyone: list[list] = [None] * dist.get_world_size()  # type: ignore[list-item]
    dist.all_gather_object(everyone, own)
    whole: dict[str, Tensor] = {}
    for pieces in everyone:
        for name, shape, offset, data in pieces:
            full = whole.setdefault(name, torch.full(shape, float("nan")))
            index = tuple(slice(o, o + n) for o, n in zip(offset, data.shape, strict=True))
            full[index] = data
    return whole


def complete_gradients(engine: Engine) -> None:
    """Undoes the distributed optimizer's reduce-scatter, so that every rank holds whole gradients."""
    if not engine.stage.parallel.distributed_optimizer:
        return
    group, size = engine.topology.data_group, engine.topology.data_size
    for buffer in engine.model.buffers:
        for bucket in buffer.buckets:
            shard = bucket.grad_data.chunk(size)[engine.topology.data_rank].clone()
            dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)


def gradients_of_step(
    parallel: ParallelConfig,
    layouts_by_step: list[list[list[tuple[int, int]]]],
    rounds: int = 1,
    **changes: object,
) -> tuple[list[float], Gradients]:
    """Returns losses of consecutive steps without updates, and on rank 0 their canonical gradients."""
    engine = start_engine(parallel, **changes)
    losses, gradients = [], []
    for number, layouts in enumerate(layouts_by_step):
        loss, gathered = _one(engine, layouts, number, rounds)
        losses.append(loss)
        gradients.append(gathered if dist.get_rank() == 0 else {})
    return losses, gradients


def _one(
    engine: Engine, layouts: list, number: int, rounds: int
) -> tuple[float, dict[str, Tensor]]:
    return of_batch(engine, recipes.step_batch(layouts, engine.topology.share, number, rounds))


def of_batch(engine: Engine, batch: StepBatch) -> tuple[float, dict[str, Tensor]]:
    """Returns loss and canonical gradients of one step."""
    topology = engine.topology
    placed = place(batch, topology)
    trained = count_trained_tokens(placed, topology)
    engine.model.zero_grad_buffer()
    engine.optimizer.zero_grad()
    reports = step_module.forward_backward(engine, placed, trained)
    step_module.finalize_model_grads([engine.model])
    complete_gradients(engine)
    result = reduce_step(placed, reports, 0.0, 2, topology)
    gathered = gather(engine, lambda p: p.main_grad.clone() if p.requires_grad else None)
    return result.loss, gathered


def losses_of_training(
    parallel: ParallelConfig, steps: int, **changes: object
) -> tuple[list[float], list[float]]:
    """Returns losses and gradient norms of real training steps on the mixed batch."""
    engine = start_engine(parallel, **changes)
    losses, norms = [], []
    for number in range(steps):
        layouts = recipes.TEXT_ONLY if number == 2 else recipes.MIXED
        batch = recipes.step_batch(layouts, engine.topology.share, number)
        result = step_module.run_step(engine, place(batch, engine.topology), num_sources=2)
        losses.append(result.loss)
        norms.append(result.grad_norm)
    return losses, norms


class Changes(NamedTuple):
    """Says which weights a training changed, by name."""

    changed: list[str]
    unchanged: list[str]
    encoder_is_same: bool


def what_training_changes(parallel: ParallelConfig, trainable: tuple[str, ...]) -> Changes:
    """Compares the weights before and after three steps."""
    engine = start_engine(parallel, trainable=trainable)
    before = _snapshot(engine)
    encoder_before = [parameter.clone() for parameter in engine.encoder.parameters()]
    for number in range(3):
        batch = recipes.step_batch(recipes.MIXED, engine.topology.share, number)
        step_module.run_step(engine, place(batch, engine.topology), num_sources=2)
    after = _snapshot(engine)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    encoder_after = engine.encoder.parameters()
    same = all(torch.equal(a, b) for a, b in zip(encoder_before, encoder_after, strict=True))
    return Changes(changed, [name for name in before if name not in changed], same)


def _snapshot(engine: Engine) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in engine.model.module.named_parameters()}


def features_of_round(parallel: ParallelConfig) -> list[Tensor] | None:
    """Returns the features of the mixed batch's microbatches as the first pipeline stage gets them."""
    engine = start_engine(parallel)
    batch = recipes.step_batch(recipes.MIXED, engine.topology.share, 0)
    (round_,) = place(batch, engine.topology).rounds
    return encode_round(engine.encoder, round_, engine.topology)
