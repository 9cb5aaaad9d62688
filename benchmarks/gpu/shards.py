"""The row that reads real shards: D's samples as JPEGs in WebDataset tars, through the loader.

Beside the row of made-up tensors in the same run it shows what the data costs: `data_ms` is how long a step
waits for its batch, `loader_samples_per_s` how many samples the loader alone makes.
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from benchmarks.gpu.activity import fresh_memory, peak_gib, seconds_of, trace
from benchmarks.gpu.packs import Planned, make_plan, turns_of
from benchmarks.gpu.rows import (
    Repeats,
    Row,
    Steps,
    TrainingRow,
    make_engine,
    memory,
    predicted_gib,
    step_figures,
    waiting,
)
from benchmarks.gpu.shapes import make_recipe
from benchmarks.images import jpeg, photo
from nvlm_train.config.schema import LoaderConfig, Recipe
from nvlm_train.data.dataset import build_data
from nvlm_train.data.prepare.write import prepare_shards
from nvlm_train.parallel.topology import collect_engines
from nvlm_train.train.engine import StageWork
from nvlm_train.train.schedule import Position
from nvlm_train.train.start import open_loader

SAMPLES_PER_SHARD = 16
WORKERS = 4
"""Threads that decode, as in the recipes of 8B and 72B."""
LOADED_ALONE = 4
"""Steps that the loader makes while nothing trains."""


def shards_row(row: TrainingRow, repeats: Repeats, keep: Path | None) -> Row:
    """Like `training_row`, with the samples in shards."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        write_shards(root, make_plan(row.sizes), row.sizes.vision.tile_size)
        # The first step, those of warming up and those that count, and one that is traced.
        steps = 1 + repeats.warm_up + repeats.timed + 1
        recipe = on_shards(make_recipe(row.architecture, row.sizes, row.trainable), root, steps)
        with fresh_memory():
            figures = _train(row, recipe, repeats, keep)
            collect_engines()
    return {"kernels": str(row.kernels)} | figures


def write_shards(root: Path, plan: Sequence[Planned], edge: int) -> None:
    """Writes the plan's samples under `root`, and a blend of them. An image has the size of its tiles."""
    samples = (
        (
            f"{number:03d}",
            {"conversations": turns_of(planned)},
            [("jpg", _photo(planned.columns * edge, planned.rows * edge))],
        )
        for number, planned in enumerate(plan)
    )
    prepare_shards(samples, str(root), "planned", SAMPLES_PER_SHARD)
    source = {"name": "planned", "shards": str(root / "planned.manifest.json"), "weight": 1}
    (root / "blend.yaml").write_text(json.dumps({"sources": [source]}))


@cache
def _photo(width: int, height: int) -> bytes:
    return jpeg(photo(width, height))


def on_shards(recipe: Recipe, root: Path, steps: int) -> Recipe:
    """A copy of the recipe whose stage draws from the shards under `root`."""
    stage = replace(recipe.stages["sft"], blend=str(root / "blend.yaml"), steps=steps)
    loader = LoaderConfig(data_root=str(root), workers=WORKERS)
    return replace(recipe, stages={"sft": stage}, loader=loader)


def _train(row: TrainingRow, recipe: Recipe, repeats: Repeats, keep: Path | None) -> Row:
    engine = make_engine(recipe, row.kernels)
    plan, encoder = build_data(recipe.stages["sft"], recipe, str(Path.cwd()))
    work = StageWork(engine, plan, encoder, {})
    with open_loader(recipe, Position("sft", 0), work) as loader:
        step = Steps(engine, loader)
        seconds = seconds_of(step, repeats.timed, repeats.warm_up + 1)
        peak, parts = peak_gib(), step.part_ms(repeats.timed)
        data_ms = statistics.median(step.data_seconds[-repeats.timed :]) * 1e3
        activity = trace(step, keep)
    return (
        step_figures(recipe, step.results, seconds)
        | {
            "data_ms": round(data_ms, 1),
            "loader_samples_per_s": round(_loader_speed(recipe, work), 1),
            "tiles": step.results[-1].work.tiles,
            "part_ms": parts,
        }
        | waiting(activity, seconds)
        | memory(peak, predicted_gib(recipe))
    )


def _loader_speed(recipe: Recipe, work: StageWork) -> float:
    """Samples a second from shards to a step's batch."""
    with open_loader(recipe, Position("sft", 0), work) as loader:
        started, samples = time.perf_counter(), 0
        batches: Iterator[object] = iter(loader)
        for _ in itertools.islice(batches, LOADED_ALONE):
            samples += recipe.stages["sft"].batch.size
        return samples / (time.perf_counter() - started)
