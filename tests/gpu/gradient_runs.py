"""Runs on the workers: gradients of two steps on a kernel path, and deliberate bugs in them."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple
from unittest import mock

import torch
from megatron.core.tensor_parallel import random

from nvlm_train.batch import Microbatch, RankShare, StepBatch
from nvlm_train.config.schema import ParallelConfig
from nvlm_train.train.engine import Engine
from tests.gpu.paths import Path
from tests.model.cross_runs import together
from tests.parity import cross_gradients, cross_recipes, dropout_runs, gradients, recipes

UNLABELLED: list[cross_recipes.Sample] = [(8, [cross_recipes.TALL]), (7, [])]
NOTHING_AGAIN = ParallelConfig()
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}


class Found(NamedTuple):
    """Holds what a step with images and an all-text one after it found."""

    losses: list[float]
    gradients: gradients.Gradients
    """On the CPU; gates as one vector."""
    attention: list[str]
    """Transformer Engine's attentions that were chosen at last; empty on other paths."""


def run(
    name: str,
    path: Path,
    parallel: ParallelConfig = NOTHING_AGAIN,
    **changes: object,
) -> Found:
    """Computes both steps: packs with tiles, one of text, one without a label, then text alone.

    Args:
        name: of `cross_recipes.ALL`.
        path: the kernels.
        parallel: the form of recomputation.
        changes: to the recipe.
    """
    with path.chosen():
        engine = cross_gradients.start_engine(name, parallel, precision=path.precision, **changes)
        steps = [
            gradients.of_batch(engine, batch) for batch in batches(name, engine.topology.share)
        ]
    return Found(
        [loss for loss, _ in steps],
        [_gates_together(each) for _, each in steps],
        _chosen_attention() if path.library == "transformer_engine" else [],
    )


def with_bug(bug: str, *arguments: object, **changes: object) -> Found:
    """Returns `run` while one of `BUGS` is in place."""
    with BUGS[bug]():
        return run(*arguments, **changes)  # type: ignore[arg-type]


def with_changes(
    name: str, path: Path, parallel: ParallelConfig, changes: dict[str, object]
) -> Found:
    """Returns `run` with changes to the recipe."""
    return run(name, path, parallel, **changes)


def with_bug_and_dropout(bug: str, name: str, path: Path, parallel: ParallelConfig) -> Found:
    """Returns `with_bug` with `DROPOUT`."""
    return with_bug(bug, name, path, parallel, **DROPOUT)


def slopes(name: str, path: Path) -> dict[str, tuple[float, float]]:
    """Returns `dropout_runs.slopes` of one process, with all kinds of dropout."""
    with path.chosen():
        return dropout_runs.slopes(name, ParallelConfig(), dropout_runs.ALL)


def batches(name: str, share: RankShare) -> list[StepBatch]:
    """Makes the packs of both steps."""
    mixed = [
        cross_recipes.pack(name, samples, number)
        for number, samples in enumerate([*cross_recipes.MIXED, UNLABELLED])
    ]
    mixed[-1] = (without_labels(mixed[-1][0]), mixed[-1][1])
    return [
        recipes.deal(mixed, share, 0, 1),
        cross_recipes.step_batch(name, cross_recipes.TEXT_ONLY, share, 1, 1),
    ]


def without_labels(pack: Microbatch) -> Microbatch:
    """Returns the pack with nothing to be trained."""
    assert len(pack.label_ids_L)
    nothing = {
        name: getattr(pack, name)[:0]
        for name in ("label_positions_L", "label_ids_L", "label_samples_L")
    }
    return replace(pack, **nothing)


def _gates_together(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return together(found) if any(key.endswith("alpha") for key in found) else found


def _chosen_attention() -> list[str]:
    """Reads what Transformer Engine keeps between calls of its attention."""
    attention = "transformer_engine.pytorch.attention.dot_product_attention"
    module = importlib.import_module(f"{attention}.dot_product_attention")
    kinds = ("use_flash_attention", "use_fused_attention", "use_unfused_attention")
    return [kind for kind in kinds if module._attention_backends[kind]]


def _leaking_packs() -> contextlib.AbstractContextManager[object]:
    """A pack says that it is one sample: then its samples see each other."""
    original = recipes.deal

    def broken(packs: list, *place: object) -> StepBatch:
        joined = [
            (replace(pack, cu_seqlens=pack.cu_seqlens[[0, -1]]), pixels) for pack, pixels in packs
        ]
        return original(joined, *place)  # type: ignore[arg-type]

    return mock.patch.object(recipes, "deal", broken)


def _other_masks_in_backward() -> contextlib.AbstractContextManager[object]:
    """What is computed again starts from whatever state the generators have."""
    return mock.patch.object(random, "_set_all_rng_states", lambda *states: None)


def _drawn_again() -> contextlib.AbstractContextManager[object]:
    """SDPA's backward draws masks of its own."""
    original = torch.nn.functional.scaled_dot_product_attention

    def broken(*states: torch.Tensor, **options: object) -> torch.Tensor:
        def attend(*again: torch.Tensor) -> torch.Tensor:
            return original(*again, **options)

        output: torch.Tensor = torch.utils.checkpoint.checkpoint(
            attend, *states, use_reentrant=True, preserve_rng_state=False
        )
        return output

    return mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", broken)


BUGS: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    "samples of a pack attend to each other": _leaking_packs,
    "recomputation draws other masks": _other_masks_in_backward,
    "the backward of attention draws other masks": _drawn_again,
}


def start_with_attention_dropout(name: str, path: Path, rate: float) -> Engine:
    """Builds a model without any other dropout; called where the path is chosen."""
    return cross_gradients.start_engine(
        name, ParallelConfig(), precision=path.precision, attention_dropout=rate
    )
