"""Writes down the samples of a step that went wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from nvlm_train.data.plan.plan import DataPlan
from nvlm_train.train.reduce_metrics import StepResult
from nvlm_train.train.schedule import Position


def samples_of_step(plan: DataPlan, step: int, data_size: int) -> list[dict[str, Any]]:
    """Returns source, shard and key of each sample of a step, over all replicas, without communication.

    Args:
        plan: the stage's plan, which is the same on every rank.
        step: counted from 0.
        data_size: number of data-parallel ranks; `replica` is one of them.
    """
    return [
        {
            "replica": replica,
            "source": plan.source_names[info.source],
            "shard": info.shard,
            "key": info.key,
        }
        for replica, packs in enumerate(plan.step(step, data_size).packs)
        for pack in packs
        for info in map(plan.info, pack.samples)
    ]


def write_samples(
    path: Path, plan: DataPlan, done: Position, result: StepResult, data_size: int
) -> None:
    """Writes what a step reported and the samples that it was made of, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "stage": done.stage,
        "step": done.step,
        "loss": _number(result.loss),
        "grad_norm": _number(result.grad_norm),
        "losses": {
            name: _number(loss / tokens)
            for name, loss, tokens in zip(
                plan.source_names, result.source_loss_sums, result.source_tokens, strict=True
            )
            if tokens
        },
        "samples": samples_of_step(plan, done.step - 1, data_size),
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def _number(value: float) -> float | str:
    """Returns a string for NaN and infinity, which JSON does not have."""
    return value if math.isfinite(value) else str(value)
