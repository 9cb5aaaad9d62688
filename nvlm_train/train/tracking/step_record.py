"""Makes the record of a step: one line of metrics.jsonl, under the names that wandb shows."""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from nvlm_train.config.schema import Recipe
from nvlm_train.costs import step_flops
from nvlm_train.train.reduce_metrics import StepResult
from nvlm_train.train.schedule import Position, global_step


@dataclass(frozen=True)
class StepSeconds:
    """Holds how long this rank took for one step, in seconds."""

    loading: float
    """Waiting for the batch."""
    total: float
    """From the end of the last step to the end of this one, loading included."""


class StepTimer:
    """Measures the seconds of a step from one call to the next."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self._loading = 0.0

    def loaded(self) -> None:
        """Notes that the step's batch has arrived."""
        self._loading = self._since_last()

    def stepped(self) -> StepSeconds:
        """Returns the seconds of the step that has just been done."""
        return StepSeconds(self._loading, self._loading + self._since_last())

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

    Tokens per second are those of the whole world; TFLOP/s are those of one rank. `data_position` counts
    the samples or packs drawn in the stage, whichever the stage's batch counts.
    """
    stage = recipe.stages[done.stage]
    flops = step_flops(recipe.model, stage, result.work)
    record: dict[str, float | int | str] = {
        "stage": done.stage,
        "step": done.step,
        "global_step": global_step(recipe, done),
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "lr": lr,
        "data_position": done.step * stage.batch.size,
        "samples": result.samples,
        "samples_hash": result.samples_hash,
        "tokens": result.work.tokens,
        "trained_tokens": result.work.trained_tokens,
        "tiles": result.work.tiles,
        "skipped_samples": result.skipped_samples,
        "seconds": seconds.total,
        "data_seconds": seconds.loading,
        "tokens_per_second": result.work.tokens / seconds.total,
        "tflops_per_rank": flops / seconds.total / dist.get_world_size() / 1e12,
        "peak_memory_gib": peak_memory_gib(),
    }
    for name, loss, tokens in zip(
        sources, result.source_loss_sums, result.source_tokens, strict=True
    ):
        if tokens:
            record[f"loss/{name}"] = loss / tokens
            record[f"trained_tokens/{name}"] = tokens
    return record


def peak_memory_gib() -> float:
    """Returns the most memory that this rank has had: allocated on its GPU, else resident on the host."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
