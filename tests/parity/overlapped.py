"""Runs on the workers: steps whose communication overlaps, in buckets so small that there are many.

On GPUs `torchrun --nproc-per-node N -m tests.parity.overlapped` compares them over NCCL with steps whose
communication does not overlap, and says by how much they differ.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from nvlm_train.config.schema import ParallelConfig
from nvlm_train.pipeline.data_parallel import DataParallel
from nvlm_train.train import engine as engine_module
from nvlm_train.train import step as step_module
from nvlm_train.train.engine import Engine
from nvlm_train.train.placing import place
from nvlm_train.train.step import run_step
from tests.parity import cross_gradients, cross_recipes, gradients, recipes

BUCKET = 3000
"""Elements of a bucket."""
_UNEVEN = {
    "d": [recipes.MIXED[0], recipes.MIXED[1], *recipes.TEXT_ONLY[:2]],
    "cross": [cross_recipes.MIXED[0], cross_recipes.MIXED[1], *cross_recipes.TEXT_ONLY[:2]],
}
"""One replica has tiles in every pack, the other in none."""


class Outcome(NamedTuple):
    """Holds what steps with updates did."""

    losses: list[float]
    norms: list[float]
    gradients: gradients.Gradients
    """By step, whole and by canonical name; on rank 0."""
    weights: dict[str, Tensor]
    """After the last step, whole and by canonical name; on rank 0."""
    buckets: int
    """Of this rank."""


def outcome(
    name: str,
    parallel: ParallelConfig,
    rounds: int = 1,
    broken_step: int | None = None,
    **changes: Any,
) -> Outcome:
    """Trains on a mixed step, an all-text one, one in which a replica has text only, and a mixed one.

    Args:
        name: "d", or one of `cross_recipes.ALL`.
        parallel: the layout.
        rounds: of each step.
        broken_step: one that has a gradient which is not finite, and is left out.
        changes: of the stage.
    """
    with small_buckets():
        # The bias of keys has next to no gradient, and Adam makes whole steps of its rounding errors: with
        # a small rate they stay rounding errors of the bias.
        engine = start(name, parallel, lr=1e-4, **changes)
    losses, norms, found = [], [], []
    for number in range(4):
        batch = step_batch(name, engine, number, rounds)
        broken = number == broken_step
        with _keeping(engine, found), _breaking() if broken else contextlib.nullcontext():
            result = run_step(engine, place(batch, engine.topology), num_sources=2)
        losses.append(result.loss)
        norms.append(result.grad_norm)
    engine.whole_model()
    weights = gradients.gather(engine, lambda parameter: parameter.data)
    is_first = dist.get_rank() == 0
    return Outcome(
        losses,
        norms,
        found if is_first else [],
        weights if is_first else {},
        len(engine.model.bucket_groups),
    )


def outcome_of(name: str, parallel: ParallelConfig, rounds: int, more: dict[str, Any]) -> Outcome:
    """Calls `outcome` with options by name, which a call on the workers cannot have."""
    return outcome(name, parallel, rounds, **more)


def start(name: str, parallel: ParallelConfig, **changes: Any) -> Engine:
    """Builds one of the models of the parity tests."""
    if name == "d":
        return gradients.start_engine(parallel, **changes)
    return cross_gradients.start_engine(name, parallel, **changes)


def step_batch(name: str, engine: Engine, number: int, rounds: int) -> Any:
    kinds = recipes if name == "d" else cross_recipes
    uneven = _UNEVEN["d" if name == "d" else "cross"]
    packs = (kinds.MIXED, kinds.TEXT_ONLY, uneven, kinds.MIXED)[number]
    share = engine.topology.share
    if name == "d":
        return recipes.step_batch(packs, share, number, rounds)
    return cross_recipes.step_batch(name, packs, share, number, rounds)


@contextlib.contextmanager
def small_buckets() -> Iterator[None]:
    original = engine_module.ddp_config

    def small(stage: Any, topology: Any) -> Any:
        return dataclasses.replace(original(stage, topology), bucket_size=BUCKET)

    with mock.patch.object(engine_module, "ddp_config", small):
        yield


@contextlib.contextmanager
def _keeping(engine: Engine, found: list[dict[str, Tensor]]) -> Iterator[None]:
    """Keeps each step's gradients, after their reduction and before they are clipped."""
    original = step_module.gradient_norm

    def norm(optimizer: Any) -> float:
        value = original(optimizer)
        # Whole gradients, of which this rank needs its own part again.
        own = [buffer.grad_data.clone() for buffer in engine.model.buffers]
        gradients.complete_gradients(engine)
        found.append(gradients.gather(engine, _main_grad))
        for buffer, before in zip(engine.model.buffers, own, strict=True):
            buffer.grad_data.copy_(before)
        return value

    with mock.patch.object(step_module, "gradient_norm", norm):
        yield


def _main_grad(parameter: torch.nn.Parameter) -> Tensor | None:
    return parameter.main_grad.clone() if parameter.requires_grad else None  # type: ignore[attr-defined]


@contextlib.contextmanager
def _breaking() -> Iterator[None]:
    """Makes a step that must be left out: its norm is not finite."""
    original = step_module.gradient_norm

    def norm(optimizer: Any) -> float:
        original(optimizer)
        return float("nan")

    with mock.patch.object(step_module, "gradient_norm", norm):
        yield


def outcome_with_bug(bug: str, name: str, parallel: ParallelConfig) -> Outcome:
    """Returns `outcome` while the named bug is in place."""
    with _BUGS[bug]():
        return outcome(name, parallel)


def _no_waiting() -> Any:
    """Weights are read although they were not gathered."""

    def make(self: DataParallel) -> Callable[..., None]:
        return lambda module, *inputs: None

    return mock.patch.multiple(
        DataParallel,
        _make_forward_pre_hook=make,
        begin_gather=lambda self: None,
        check_gathered=lambda self: None,
    )


def _not_marked() -> Any:
    """A module that packs pass by waits for its own parameters only, as megatron-core's hook does."""
    from megatron.core.distributed import DistributedDataParallel

    return mock.patch.object(
        DataParallel,
        "_make_forward_pre_hook",
        DistributedDataParallel._make_forward_pre_hook,
    )


def _read_too_early() -> Any:
    """Weights are read after a step without asking for all of them."""
    return mock.patch.object(DataParallel, "gather_weights", lambda self: None)


def _as_ready() -> Any:
    """Each replica reduces a bucket as soon as its gradients are there, as megatron-core does."""

    def start(self: DataParallel, number: int, **options: Any) -> None:
        self._start[number](**options)

    return mock.patch.object(DataParallel, "_start_in_order", start)


_BUGS: dict[str, Callable[[], Any]] = {
    "weights are read before they are gathered": _no_waiting,
    "weights are saved before they are gathered": _read_too_early,
    "a module that packs pass by gathers its own weights only": _not_marked,
    "buckets start when they are ready": _as_ready,
}


def main() -> None:
    """Prints for each model and layout the worst difference that overlap makes."""
    from nvlm_train.parallel.topology import process_group
    from tests.parity.test_overlap import worst_error

    with process_group():
        layouts = [ParallelConfig()] if dist.get_world_size() < 4 else [
            ParallelConfig(), ParallelConfig(pipeline=2),
            ParallelConfig(tensor=2, sequence_parallel=True),
        ]  # fmt: skip
        for name in ("d", "x", "h", "x with feed-forward", "flamingo"):
            for layout in layouts:
                off = recipes.with_parallel(
                    layout, overlap_grad_reduce=False, overlap_param_gather=False
                )
                found, expected = (outcome(name, each) for each in (layout, off))
                if dist.get_rank() == 0:
                    of_gradients = worst_error(found.gradients, expected.gradients)
                    of_weights = worst_error([found.weights], [expected.weights])
                    sys.stdout.write(
                        f"{name} TP{layout.tensor} PP{layout.pipeline}: gradients differ by "
                        f"{of_gradients:.1e}, weights by {of_weights:.1e}\n"
                    )


if __name__ == "__main__":
    main()
