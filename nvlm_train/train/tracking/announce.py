"""What a run prints before it trains: the machine, what is frozen, and derived numbers."""

from __future__ import annotations

import logging

import torch.distributed as dist

from nvlm_train import geometry
from nvlm_train.config.schema import Recipe
from nvlm_train.parallel import kernels
from nvlm_train.parallel.topology import device
from nvlm_train.train.schedule import Position
from nvlm_train.train.start import Run, StageWork
from nvlm_train.train.tracking.report import NumberRow, PartRow, freeze_table, numbers_table, render

logger = logging.getLogger(__name__)


def machine(precision: str) -> None:
    """World size, device and kernels; a warning where the precision is a bad choice for them."""
    logger.info(
        "world size %d on %s; kernels: %s", dist.get_world_size(), device().type, kernels.detect()
    )
    if precision == "bf16" and not kernels.multiplies_bf16():
        logger.warning(
            "precision=bf16: this CPU has no bf16 matrix products (AVX512-BF16 or AMX), so they are "
            "computed in fp32 and rounded; precision=fp32 is faster here"
        )


def stage(recipe: Recipe, position: Position, work: StageWork) -> None:
    """The freeze table and the derived numbers of a stage that starts or goes on."""
    if dist.get_rank() != 0:
        return
    name, settings = position.stage, recipe.stages[position.stage]
    parts = [
        PartRow(part, count, part in settings.trainable, settings.optimizer.lr)
        for part, count in geometry.part_parameters(recipe.model).items()
    ]
    logger.info("%s at step %d of %d", name, position.step, settings.steps)
    for table in (freeze_table(name, parts), numbers_table(name, _numbers(recipe, work))):
        logger.info("\n%s", render(table))


def finished(recipe: Recipe, run: Run) -> None:
    """Says of a run that is started again at its end why nothing happens, and how to go on."""
    if dist.get_rank() != 0:
        return
    last = recipe.schedule[-1]
    stages = ", ".join(f"{name} {recipe.stages[name].steps}" for name in recipe.schedule)
    logger.info(
        "run_dir=%s is finished (steps: %s; newest checkpoint: %s), so nothing is trained; raise "
        "stages.%s.steps to train longer, or use another run_dir to train anew",
        recipe.run_dir,
        stages,
        run.checkpoint and run.checkpoint.name,
        last,
    )


def _numbers(recipe: Recipe, work: StageWork) -> list[NumberRow]:
    stage, topology, vision = work.engine.stage, work.engine.topology, recipe.model.vision
    first = work.plan.step(0, topology.data_size)
    packs = [pack for rank_packs in first.packs for pack in rank_packs]
    layout = f"TP {topology.tensor_size} x PP {topology.pipeline_size} x DP {topology.data_size}"
    memory = geometry.rank_memory(recipe.model, stage, recipe.precision, topology.data_size)
    return [
        NumberRow("layout", layout, "parallel.tensor, .pipeline, and what remains of the world"),
        NumberRow(
            "tokens per tile",
            str(geometry.tokens_per_tile(vision)),
            f"({vision.tile_size} / {vision.patch_size} / {geometry.PIXEL_SHUFFLE})^2",
        ),
        NumberRow("samples", _count(work), "usable samples of the blend, by source"),
        NumberRow("step 0: packs", str(len(packs)), f"sequences of {stage.sequence_length} tokens"),
        NumberRow(
            "step 0: microbatches",
            str(max(len(rank_packs) for rank_packs in first.packs)),
            "packs of the busiest data-parallel rank",
        ),
        NumberRow(
            "step 0: tokens",
            f"{sum(pack.num_tokens for pack in packs):,}",
            f"{sum(pack.num_tiles for pack in packs)} tiles among them; without padding",
        ),
        NumberRow(
            "memory a rank",
            f"{memory / 2**20:,.0f} MiB",
            "weights, gradients, optimizer and encoder of the fullest stage; no activations",
        ),
    ]


def _count(work: StageWork) -> str:
    return ", ".join(
        f"{source.name} {source.num_samples - source.num_unusable:,}"
        for source in work.plan.sources
    )
