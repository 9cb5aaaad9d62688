"""Runs on the workers: checkpoints between kernel libraries.

Transformer Engine needs a GPU. What it does to a checkpoint does not: its modules have an extra state
(`_extra_state`, empty without FP8), and its Adam keeps fields of its own in each group. Stand-ins do
the same two things here; `tests/train/checkpoint/test_other_kernels.py -m gpu` uses the library itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from megatron.core import optimizer as factory
from torch import Tensor

from nvlm_train.config.schema import ParallelConfig
from nvlm_train.model import layers
from nvlm_train.parallel import kernels
from nvlm_train.parallel.adam import GroupStepAdamW
from nvlm_train.train.checkpoint import sharded_state
from nvlm_train.train.engine import Engine
from nvlm_train.train.placing import place
from nvlm_train.train.step import run_step
from tests.parity import recipes
from tests.parity.gradients import gather, start_engine
from tests.train.checkpoint.direct_save import save_directly


class NormWithState(layers.RMSNorm):
    """Adds an empty extra state to a norm, as Transformer Engine's modules have one without FP8."""

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        assert state is None or state.numel() == 0


class AdamWithCorrection(GroupStepAdamW):
    """Reads a field that only its own groups have, as fused Adams do."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for group in self.param_groups:
            group["bias_correction"] = True

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert all(group["bias_correction"] for group in self.param_groups)
        super().step(closure)


@contextlib.contextmanager
def library(name: str) -> Iterator[None]:
    """Puts a library in place: `own` or its stand-in `other`; on a GPU `torch` or `transformer_engine`."""
    if name in ("torch", "transformer_engine"):
        chosen = kernels.choose(
            kernels.Available(
                cuda=True,
                transformer_engine=name == "transformer_engine",
                apex=False,
                apex_weight_gradient=False,
            )
        )
        with mock.patch.object(kernels, "detect", lambda: chosen):
            yield
        return
    if name == "own":
        yield
        return
    with (
        mock.patch.object(layers, "RMSNorm", NormWithState),
        mock.patch.object(factory, "Adam", AdamWithCorrection),
    ):
        yield


def across(writer: str, reader: str, parallel: ParallelConfig, directory: Path) -> tuple[Any, Any]:
    """Trains a step, saves with one library's modules, loads with another's, and trains one more step.

    Returns:
        Weights at the end, and those of an engine that was never saved; on rank 0.
    """
    with library(writer):
        first = start_engine(parallel)
        _step(first, 0)
        save_directly(first, directory)
        saved = _weights(first)
        # Now, because the next engine's groups take the place of this one's.
        _step(first, 1)
        expected = _weights(first)
    with library(reader):
        second = start_engine(parallel)
        sharded_state.load(second, directory, same_layout=True)
        _step(second, 1)
        found = _weights(second)
        third = start_engine(parallel)
        sharded_state.load_weights(third.model.module, directory)
        with_weights = _weights(third)
    assert all(torch.equal(with_weights[name], value) for name, value in saved.items())
    return found, expected


def number_of_states(name: str) -> int:
    """Counts the modules with an extra state in an engine: the stand-in takes the place of norms."""
    with library(name):
        engine = start_engine(ParallelConfig())
    modules = engine.model.module.modules()
    return sum(isinstance(module, NormWithState) for module in modules)


def _step(engine: Engine, number: int) -> None:
    batch = recipes.step_batch(recipes.MIXED, engine.topology.share, number)
    run_step(engine, place(batch, engine.topology), 2)


def _weights(engine: Engine) -> dict[str, Tensor]:
    return gather(engine, lambda parameter: parameter.data)


def load_without_a_shard(directory: Path) -> str:
    """Removes a file after the digests were read. Returns the error that torch's own exception becomes."""
    from nvlm_train.errors import CheckpointError

    engine = start_engine(ParallelConfig())
    _step(engine, 0)
    save_directly(engine, directory)
    for path in directory.glob("*.distcp"):
        path.write_bytes(b"")
    try:
        sharded_state.load(engine, directory, same_layout=True)
    except CheckpointError as error:
        return str(error)
    return "loaded"
