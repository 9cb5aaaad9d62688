"""Prints what a run starts with: the machine, what is trained and frozen, and derived numbers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from nvlm_train import costs, geometry
from nvlm_train.batch import StepPlan
from nvlm_train.config.schema import Recipe, StageConfig
from nvlm_train.parallel import kernels
from nvlm_train.parallel.topology import device
from nvlm_train.recipe import sizes
from nvlm_train.train.checkpoint.run_state import Run
from nvlm_train.train.engine import StageWork
from nvlm_train.train.schedule import Position

logger = logging.getLogger(__name__)

WIDTH = 110
"""Columns of a table in a log, which has no terminal to say how wide it is."""


@dataclass(frozen=True)
class PartRow:
    """Holds one row of the freeze table: a module and whether it trains."""

    module: str
    parameters: int
    is_trainable: bool
    lr: float | None = None
    """Largest learning rate of the stage; None for a frozen part."""


@dataclass(frozen=True)
class NumberRow:
    """Holds one derived number: its name, its value as text, and how it is computed."""

    name: str
    value: str
    how: str


def machine(precision: str) -> None:
    """Logs world size, device and kernels, and warns when the precision is a bad choice for them."""
    logger.info(
        "world size %d on %s; kernels: %s", dist.get_world_size(), device().type, kernels.detect()
    )
    if precision == "bf16" and not kernels.multiplies_bf16():
        logger.warning(
            "precision=bf16: this CPU has no bf16 matrix products (AVX512-BF16 or AMX), so they are "
            "computed in fp32 and rounded; precision=fp32 is faster here"
        )


def model(recipe: Recipe) -> None:
    """Logs the sizes of both backbones, wherever the recipe has them from."""
    if dist.get_rank() == 0:
        logger.info("model.vision: %s", sizes.shown(recipe.model.vision))
        logger.info("model.language: %s", sizes.shown(recipe.model.language))


def stage(recipe: Recipe, position: Position, work: StageWork) -> None:
    """Logs what trains and the derived numbers of a stage that starts or goes on."""
    if dist.get_rank() != 0:
        return
    name, settings = position.stage, recipe.stages[position.stage]
    parts = [
        PartRow(part, count, part in settings.trainable, settings.optimizer.lr)
        for part, count in costs.part_parameters(recipe.model).items()
    ]
    logger.info("%s at step %d of %d", name, position.step, settings.steps)
    first = work.plan.step(0, work.engine.topology.data_size)
    numbers = numbers_table(name, _numbers(recipe, work, first))
    for table in (freeze_table(name, parts), numbers):
        logger.info("\n%s", render(table))
    _warn_of_few_packs(name, first, work)


def finished(recipe: Recipe, run: Run) -> None:
    """Tells why nothing happens when a finished run is started again, and how to train further."""
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


def _numbers(recipe: Recipe, work: StageWork, first: StepPlan) -> list[NumberRow]:
    stage, topology, vision = work.engine.stage, work.engine.topology, recipe.model.vision
    packs = [pack for rank_packs in first.packs for pack in rank_packs]
    layout = f"TP {topology.tensor_size} x PP {topology.pipeline_size} x DP {topology.data_size}"
    memory = costs.rank_memory(recipe.model, stage, recipe.precision, topology.data_size)
    return [
        NumberRow("layout", layout, "parallel.tensor, .pipeline, and what remains of the world"),
        NumberRow(
            "tokens per tile",
            str(geometry.tokens_per_tile(vision)),
            f"({vision.tile_size} / {vision.patch_size} / {geometry.PIXEL_SHUFFLE})^2",
        ),
        NumberRow("samples", _count(work), "usable samples of the blend, by source"),
        NumberRow("step 0: packs", str(len(packs)), _lengths(stage, first.pack_length)),
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


def _lengths(stage: StageConfig, length: int) -> str:
    if geometry.pack_length(stage) == stage.sequence_length:
        return f"sequences of {length} tokens"
    return f"sequences of {length} tokens, of samples of at most {stage.sequence_length}"


def _warn_of_few_packs(name: str, first: StepPlan, work: StageWork) -> None:
    """Warns where a pipeline gets fewer packs than it has stages: some of them never work at one time."""
    depth, fewest = work.engine.topology.pipeline_size, min(len(packs) for packs in first.packs)
    stage = work.engine.stage
    if fewest < depth:
        logger.warning(
            "stages.%s.pack_length=%s: step 0 has %d pack(s) for a pipeline of %d stages, which wait for "
            "each other; use shorter packs, a larger batch.size, or fewer data-parallel ranks",
            name, geometry.pack_length(stage), fewest, depth,
        )  # fmt: skip


def _count(work: StageWork) -> str:
    return ", ".join(
        f"{source.name} {source.num_samples - source.num_unusable:,}"
        for source in work.plan.sources
    )


def freeze_table(stage: str, rows: Sequence[PartRow]) -> Table:
    """Makes the table of the modules that a stage trains, and of those that do not change at all."""
    table = Table(title=f"stage {stage}: what trains", title_justify="left")
    table.add_column("module")
    table.add_column("parameters", justify="right")
    table.add_column("state")
    table.add_column("lr", justify="right")
    for row in rows:
        rate = "-" if row.lr is None or not row.is_trainable else f"{row.lr:.2e}"
        state = "trainable" if row.is_trainable else "frozen"
        table.add_row(row.module, f"{row.parameters:,}", state, rate)
    total = sum(row.parameters for row in rows)
    trained = sum(row.parameters for row in rows if row.is_trainable)
    share = f"{100 * trained / total:.1f}% trainable" if total else "-"
    table.add_section()
    table.add_row("all", f"{total:,}", share, "")
    return table


def numbers_table(stage: str, rows: Sequence[NumberRow]) -> Table:
    """Makes the table of the numbers that follow from the recipe."""
    table = Table(title=f"stage {stage}: derived numbers", title_justify="left")
    table.add_column("number")
    table.add_column("value", justify="right")
    table.add_column("how computed")
    for row in rows:
        table.add_row(row.name, row.value, row.how)
    return table


def render(table: Table, width: int = WIDTH) -> str:
    """Returns a table as plain text, for the log."""
    console = Console(width=width, no_color=True, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip("\n")
