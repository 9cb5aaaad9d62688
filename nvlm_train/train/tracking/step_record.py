"""Makes the record of a step: one line of metrics.jsonl, under the names that wandb shows.

Each field is declared once, with its meaning and its unit; docs/reference/metrics.md is made from that.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from nvlm_train.cards import bf16_peak
from nvlm_train.config.schema import Recipe
from nvlm_train.costs import StepFlops, step_flops_by_part
from nvlm_train.train.part_timer import PartSeconds, PartTimer
from nvlm_train.train.reduce_metrics import StepResult
from nvlm_train.train.schedule import Position, global_step
from nvlm_train.vision.ahead import FeatureSource


@dataclass(frozen=True)
class StepRecord:
    """Every step writes these fields. Sums are over all data-parallel ranks, and equal on every rank."""

    stage: str
    """The step belongs to this stage of the recipe's schedule."""
    step: int
    """This many steps of the stage are done, this one included. [steps]"""
    global_step: int
    """This many steps of the whole schedule are done, this one included. [steps]"""
    loss: float
    """The cross-entropy is a mean over all trained tokens of the step. [nats per token]"""
    grad_norm: float
    """The L2 norm is over all trained parameters, before clipping; NaN where it is not finite. [none]"""
    lr: float
    """The learning rate is the one that this step's update used. [per step]"""
    data_position: int
    """The stage has drawn this many of what `batch.unit` counts. [samples or packs]"""
    samples: int
    """The step's packs hold this many samples, the skipped ones included. [samples]"""
    samples_hash: int
    """CRC-32 values of the samples' names are summed: equal for equal samples in any order. [none]"""
    tokens: int
    """The decoder saw this many tokens, image tokens included and padding not. [tokens]"""
    trained_tokens: int
    """The loss is over this many tokens. [tokens]"""
    tiles: int
    """The vision encoder encoded this many tiles, thumbnails included. [tiles]"""
    skipped_samples: int
    """This many samples were not trained on, since their images could not be decoded. [samples]"""
    seconds: float
    """Rank 0 took this long since the end of its step before. [seconds]"""
    data_seconds: float
    """Rank 0 took this part of `seconds` before its batch was there; a save in between is in it. [seconds]"""
    tokens_per_second: float
    """The rate is `tokens` divided by `seconds`. [tokens/second]"""
    tflops_per_rank: float
    """Model FLOPs (`costs.step_flops`) are divided by `seconds` and by all ranks. [TFLOP/s]"""
    peak_memory_gib: float
    """Rank 0 had at most this much since it started, on its GPU, or resident where there is none. [GiB]"""


@dataclass(frozen=True)
class SourceRecord:
    """A step writes these fields for each source of the blend that it trained tokens of."""

    loss: float
    """The cross-entropy is a mean over the step's trained tokens of this source. [nats per token]"""
    trained_tokens: int
    """This many of the step's `trained_tokens` are of this source. [tokens]"""

    def named(self, source: str) -> dict[str, float | int]:
        """The fields under their names in a record: `loss/SOURCE`."""
        return {f"{field}/{source}": value for field, value in vars(self).items()}


@dataclass(frozen=True)
class PartSpeed:
    """A step writes this field for `encode`, `layers` and `output`, where rank 0 had such a part."""

    tflops_per_rank: float
    """A rank's share of the part's model FLOPs is divided by its `seconds/PART`. [TFLOP/s]"""


@dataclass(frozen=True)
class BesideSeconds:
    """A step writes this field on a GPU, where tiles are encoded while the round before theirs trains."""

    encode_beside: float
    """The GPU encoded this step's tiles for this long on a stream of its own, beside the training: it is no
    part of `seconds`, and counts for `tflops_per_rank/encode`. [seconds]"""


@dataclass(frozen=True)
class PeakShare:
    """A step writes this field on a card whose peak is in `nvlm_train/cards.py`."""

    mfu: float
    """The step's `tflops_per_rank` is this share of the card's dense bf16 peak; 0.45 means 45%. [share]"""


@dataclass(frozen=True)
class PartPeakShare:
    """A step writes this field beside `tflops_per_rank/PART` on a card whose peak is known."""

    mfu: float
    """The part's `tflops_per_rank/PART` is this share of the card's dense bf16 peak. [share]"""


@dataclass(frozen=True)
class StepSeconds:
    """Holds how long this rank took for one step, in seconds."""

    loading: float
    """Waiting for the batch."""
    total: float
    """From the end of the last step to the end of this one, loading included."""
    parts: PartSeconds
    """What the time went to."""
    encode_beside: float = 0.0
    """What features took on a stream of their own; no part of `total`."""


class StepTimer:
    """Measures the seconds of a step from one call to the next.

    Args:
        parts: splits them; what it has counted before is dropped.
        features: knows the seconds of what is encoded beside the training.
    """

    def __init__(self, parts: PartTimer, features: FeatureSource) -> None:
        self._parts, self._features = parts, features
        self._parts.read()
        self._features.read_beside()
        self._last = time.perf_counter()
        self._loading = 0.0

    def loaded(self) -> None:
        """Notes that the step's batch has arrived."""
        self._loading = self._since_last()

    def stepped(self) -> StepSeconds:
        """Returns the seconds of the step that has just been done."""
        total = self._loading + self._since_last()
        return StepSeconds(self._loading, total, self._parts.read(), self._features.read_beside())

    def _since_last(self) -> float:
        now = time.perf_counter()
        elapsed, self._last = now - self._last, now
        return elapsed


def step_record(
    recipe: Recipe,
    sources: Sequence[str],
    done: Position,
    lr: float,
    result: StepResult,
    seconds: StepSeconds,
) -> dict[str, float | int | str]:
    """Returns the record of the step that led to `done`.

    It has the fields of a StepRecord, a SourceRecord of each source, PartSeconds, and of each part its speed.
    """
    stage = recipe.stages[done.stage]
    flops = step_flops_by_part(recipe.model, stage, result.work)
    tflops = flops.total / seconds.total / dist.get_world_size() / 1e12
    record = StepRecord(
        stage=done.stage,
        step=done.step,
        global_step=global_step(recipe, done),
        loss=result.loss,
        grad_norm=result.grad_norm,
        lr=lr,
        data_position=done.step * stage.batch.size,
        samples=result.samples,
        samples_hash=result.samples_hash,
        tokens=result.work.tokens,
        trained_tokens=result.work.trained_tokens,
        tiles=result.work.tiles,
        skipped_samples=result.skipped_samples,
        seconds=seconds.total,
        data_seconds=seconds.loading,
        tokens_per_second=result.work.tokens / seconds.total,
        tflops_per_rank=tflops,
        peak_memory_gib=peak_memory_gib(),
    )
    fields: dict[str, float | int | str] = dict(vars(record))
    for name, loss, tokens in zip(
        sources, result.source_loss_sums, result.source_tokens, strict=True
    ):
        if tokens:
            fields |= SourceRecord(loss=loss / tokens, trained_tokens=tokens).named(name)
    return fields | _speeds(flops, tflops, seconds)


def _speeds(flops: StepFlops, tflops: float, seconds: StepSeconds) -> dict[str, float]:
    """Fields about what the step's time went to, and how fast this rank was in it.

    Ranks share the step's FLOPs of a part evenly: each that has such a part is charged an equal share.
    """
    fields = {f"seconds/{part}": value for part, value in vars(seconds.parts).items()}
    if seconds.encode_beside:
        beside = BesideSeconds(seconds.encode_beside)
        fields |= {f"seconds/{field}": value for field, value in vars(beside).items()}
    speeds = {"tflops_per_rank": tflops}
    for part, count in vars(flops).items():
        own = vars(seconds.parts)[part]
        own += seconds.encode_beside if part == "encode" else 0.0
        if count and own:
            speeds[f"tflops_per_rank/{part}"] = count / dist.get_world_size() / own / 1e12
    fields |= speeds
    peak = bf16_peak(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    if peak is not None:
        fields |= {
            name.replace("tflops_per_rank", "mfu"): speed * 1e12 / peak
            for name, speed in speeds.items()
        }
    return fields


def peak_memory_gib() -> float:
    """Returns the most memory that this rank has had: allocated on its GPU, else resident on the host."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
