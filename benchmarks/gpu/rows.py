"""Rows of benchmarks/gpu that train with this trainer, and those of the encoders alone."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.activity import (
    Activity,
    event_ms,
    fresh_memory,
    peak_gib,
    seconds_of,
    trace,
)
from benchmarks.gpu.packs import encode, make_plan, noise, pack, step_batch, without_images
from benchmarks.gpu.shapes import SFT, Sizes, make_recipe
from nvlm_train import costs, geometry
from nvlm_train.batch import StepBatch
from nvlm_train.cards import bf16_peak
from nvlm_train.config.model_schema import Architecture, ModelConfig, VisionConfig
from nvlm_train.config.schema import Recipe, StageConfig, TrainablePart
from nvlm_train.costs import StepWork
from nvlm_train.parallel.kernels import Kernels
from nvlm_train.parallel.topology import build_topology, collect_engines, device
from nvlm_train.train import placing
from nvlm_train.train.engine import Engine, build_engine
from nvlm_train.train.reduce_metrics import StepResult
from nvlm_train.train.step import run_step
from nvlm_train.vision.intern_vit import InternViT
from nvlm_train.vision.tile_parallel import encode_tiles

PEAK_FLOPS = bf16_peak("NVIDIA H200") or 0.0
"""What MFU is a share of, on any device: bf16 products of an H100 or H200 a second."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Repeats:
    """How often a step runs before it counts, and while it does."""

    warm_up: int
    timed: int


@dataclass(frozen=True)
class TrainingRow:
    """What a row trains; `kernels` are those of its layers (the optimizer's are the process's)."""

    architecture: Architecture
    sizes: Sizes
    kernels: Kernels
    trainable: tuple[TrainablePart, ...] = SFT
    has_images: bool = True


def training_row(row: TrainingRow, repeats: Repeats, keep: Path | None) -> Row:
    """Steps of `row`: throughput, MFU, what the device did, memory."""
    recipe = make_recipe(row.architecture, row.sizes, row.trainable)
    batch = make_batch(row)
    with fresh_memory():
        figures = _train(make_engine(recipe, row.kernels), recipe, batch, repeats, keep)
        collect_engines()
    packs = len(batch.rounds[0].microbatches)
    return {"kernels": str(row.kernels), "packs": packs} | figures


def _train(
    engine: Engine, recipe: Recipe, batch: StepBatch, repeats: Repeats, keep: Path | None
) -> Row:
    steps = Steps(engine, itertools.repeat(batch))
    steps()
    seconds = seconds_of(steps, repeats.timed, repeats.warm_up)
    peak, parts = peak_gib(), steps.part_ms(repeats.timed)
    activity = trace(steps, keep)
    return (
        step_figures(recipe, steps.results, seconds)
        | {"part_ms": parts}
        | waiting(activity, seconds)
        | encoding_figures(engine.encoder, batch, repeats)
        | memory(peak, predicted_gib(recipe))
    )


class Steps:
    """Takes steps as training does: on a GPU, one is placed and its tiles encoded while the last one trains.

    Args:
        engine: what trains.
        batches: a step takes one of them.
    """

    def __init__(self, engine: Engine, batches: Iterable[StepBatch]) -> None:
        self._engine = engine
        self._placed = placing.ahead(batches, engine.topology, engine.features)
        self._part_seconds: list[dict[str, float]] = []
        self.results: list[StepResult] = []
        self.data_seconds: list[float] = []
        """What each step waited for its batch."""

    def __call__(self) -> None:
        started = time.perf_counter()
        batch = next(self._placed)
        self.data_seconds.append(time.perf_counter() - started)
        self.results.append(run_step(self._engine, batch, num_sources=1))
        beside = {"encode_beside": self._engine.features.read_beside()}
        self._part_seconds.append(vars(self._engine.parts.read()) | beside)

    def part_ms(self, steps: int) -> dict[str, float]:
        """Mean milliseconds of each part over the last steps (`train/part_timer.py`)."""
        last = self._part_seconds[-steps:]
        return {
            part: round(statistics.mean(each[part] for each in last) * 1e3, 1) for part in last[0]
        }


def step_figures(recipe: Recipe, results: Sequence[StepResult], seconds: float) -> Row:
    """Work, losses, throughput and MFU of steps that took `seconds` each."""
    last = results[-1]
    return (
        {
            "samples": last.samples,
            "trained_tokens": last.work.trained_tokens,
            "losses": [round(each.loss, 4) for each in results],
        }
        | speed(last.work.tokens, last.samples, seconds)
        | utilisation(flops_by_part(recipe.model, recipe.stages["sft"], last.work), seconds)
    )


def predicted_gib(recipe: Recipe) -> float:
    """What the planner says of this rank's memory, activations of full packs included (`nvlm doctor`)."""
    model, stage, precision = recipe.model, recipe.stages["sft"], recipe.precision
    needed = costs.rank_memory(model, stage, precision, data_size=1)
    return (needed + costs.activation_bytes(model, stage, precision)) / 2**30


def make_batch(row: TrainingRow) -> StepBatch:
    """The plan's samples as the row's architecture reads them, packed."""
    samples = encode(row.architecture, row.sizes, make_plan(row.sizes))
    if not row.has_images:
        samples = [without_images(sample) for sample in samples]
    return step_batch(pack(samples, row.sizes.pack_length), row.sizes.vision)


def make_engine(recipe: Recipe, kernels: Kernels) -> Engine:
    """With random weights, made on the device: speed does not depend on them.

    The engine is built with an encoder of one layer, which is then replaced: its own would be
    initialised on the CPU, which takes minutes for 6B.
    """
    vision = recipe.model.vision
    model = replace(recipe.model, vision=replace(vision, num_layers=1))
    small = replace(recipe, model=model)
    stage = small.stages["sft"]
    engine = build_engine(small, stage, build_topology(stage.parallel, small.seed), kernels)
    randomise(engine.model.module)
    engine.reload_optimizer_weights()
    engine.features.encoder = make_encoder(vision)
    return engine


def make_encoder(vision: VisionConfig) -> InternViT:
    """In bf16 on the device, with random weights."""
    torch.manual_seed(0)
    with torch.device(device()):
        encoder = InternViT(vision)
    randomise(encoder)
    return encoder.to(torch.bfloat16).eval().requires_grad_(False)


def randomise(module: nn.Module) -> None:
    """Norms and layer scales one, gates open halfway, biases zero, all else normal."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "norm" in name or "lambda" in name:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            elif name.endswith("alpha"):
                parameter.fill_(0.5)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.normal_(std=0.02)


def encoding_figures(encoder: InternViT, batch: StepBatch, repeats: Repeats) -> Row:
    """Time of encoding the step's tiles alone; nothing where there are none."""
    tiles = batch.rounds[0].pixels_TCEE
    if not len(tiles):
        return {"tiles": 0}
    encode_ms = event_ms(lambda: encode_tiles(encoder, tiles), repeats.timed, warm_up=1)
    return {"tiles": len(tiles), "encode_ms": round(encode_ms, 1)}


def encoder_row(vision: VisionConfig, tiles: int, repeats: Repeats, keep: Path | None) -> Row:
    """Tiles a second through `encode_tiles`, as a round of a step encodes them."""
    with fresh_memory():
        return _encode(make_encoder(vision), noise(tiles, vision), repeats, keep)


def _encode(encoder: InternViT, tiles: Tensor, repeats: Repeats, keep: Path | None) -> Row:
    def encode_all() -> Tensor:
        return encode_tiles(encoder, tiles)

    seconds = seconds_of(encode_all, repeats.timed, repeats.warm_up)
    peak = peak_gib()
    vision = encoder.config
    predicted = 2 * costs.vision_parameters(vision) / 2**30
    return (
        {
            "tiles": len(tiles),
            "batch_tiles": geometry.encoder_batch(vision),
            "ms": round(seconds * 1e3, 1),
            "tiles_per_s": round(len(tiles) / seconds, 1),
        }
        | utilisation({"encoder": encoder_flops(vision, len(tiles))}, seconds)
        | waiting(trace(encode_all, keep), seconds)
        | memory(peak, predicted)
    )


def flops_by_part(model: ModelConfig, stage: StageConfig, work: StepWork) -> dict[str, float]:
    """`costs.step_flops` of a step, by what causes them; it is linear in the work.

    `layers` holds products with weights; the last layer's, which only trained tokens meet, are with
    `trained`, as the logits are.
    """
    none = StepWork(0, 0, 0, 0)
    shares = {
        "layers": replace(none, tokens=work.tokens),
        "attention": replace(none, attention_pairs=work.attention_pairs),
        "trained": replace(none, trained_tokens=work.trained_tokens),
        "tiles": replace(none, tiles=work.tiles),
        "cross": replace(
            none,
            cross_tokens=work.cross_tokens,
            context_tokens=work.context_tokens,
            cross_pairs=work.cross_pairs,
        ),
    }
    parts = {name: costs.step_flops(model, stage, share) for name, share in shares.items()}
    encoder = encoder_flops(model.vision, work.tiles)
    return {"encoder": encoder, "projector": parts.pop("tiles") - encoder} | parts


def encoder_flops(vision: VisionConfig, tiles: int) -> float:
    """The encoder's forward pass: what `costs.step_flops` counts for tiles before the projector."""
    tiny = make_recipe("x", Sizes("toy", "toy", pack_length=256, samples=1), trainable=())
    model = replace(tiny.model, vision=vision)
    every = costs.step_flops(model, tiny.stages["sft"], StepWork(0, 0, 0, tiles))
    inputs, outputs = geometry.tile_feature_size(vision), model.language.hidden_size
    projector = 2.0 * costs.projector_weights(inputs, model.projector, outputs)
    return every - projector * tiles * geometry.tokens_per_tile(vision)


def speed(tokens: int, samples: int, seconds: float) -> Row:
    return {
        "ms": round(seconds * 1e3, 1),
        "tokens": tokens,
        "tokens_per_s": round(tokens / seconds),
        "samples_per_s": round(samples / seconds, 2),
    }


def utilisation(flops: dict[str, float], seconds: float) -> Row:
    return {
        "mfu": round(sum(flops.values()) / seconds / PEAK_FLOPS, 4),
        "tflop": {part: round(value / 1e12, 3) for part, value in flops.items() if value},
    }


def waiting(activity: Activity, seconds: float) -> Row:
    """The busy share is of a step that was not traced: tracing slows the host."""
    return {
        "gpu_ms": round(activity.gpu_ms, 1),
        "busy": round(activity.gpu_ms / (seconds * 1e3), 3),
        "kernels_run": activity.kernels,
        "launches": activity.launches,
        "synchronisations": activity.synchronisations,
        "host_reads": activity.host_reads,
        "operations": activity.operations,
        "longest_kernels_ms": activity.longest(12),
    }


def memory(peak: float | None, predicted: float) -> Row:
    return {
        "peak_gib": None if peak is None else round(peak, 2),
        "predicted_gib": round(predicted, 2),
    }
