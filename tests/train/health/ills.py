"""Runs on the workers: training runs in which something real goes wrong on one rank at one step."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from nvlm_train.batch import StepBatch
from nvlm_train.parallel.topology import build_topology
from nvlm_train.train import loop
from nvlm_train.train.checkpoint import directory, sharded_state
from nvlm_train.train.engine import Engine, build_engine
from nvlm_train.train.optimizer import parts
from nvlm_train.train.reduce_metrics import StepResult
from tests.train import runs
from tests.train.smoke import smoke_recipe

Ill = Callable[[Engine, int], None]
"""Called on every rank before a step, with the step's number from 1."""


@contextlib.contextmanager
def before_steps(ill: Ill) -> Iterator[None]:
    """Calls `ill` before each training step."""
    original = loop.run_step

    def run_step(engine: Engine, batch: StepBatch, num_sources: int) -> StepResult:
        ill(engine, batch.step + 1)
        return original(engine, batch, num_sources)

    with mock.patch.object(loop, "run_step", run_step):
        yield


def engines_alive(root: Path, run_dir: Path, *overrides: str) -> list[int]:
    """Returns how many models with gradient buffers this rank holds at each step."""
    counts = []

    def count(engine: Engine, number: int) -> None:
        counts.append(sum(type(each) is type(engine.model) for each in gc.get_objects()))

    with before_steps(count):
        runs.run(root, run_dir, *overrides)
    return counts


def not_a_number(
    root: Path, run_dir: Path, rank: int, steps: tuple[int, ...], *overrides: str
) -> int | str:
    """Puts a NaN into the gradient of one norm of one rank, in its backward, where all collectives see it."""

    def ill(engine: Engine, number: int) -> None:
        if number in steps and dist.get_rank() == rank:
            trained = [each for each in engine.model.module.parameters() if each.requires_grad]
            norm = [each for each in trained if each.dim() == 1][-1]
            hooks.append(norm.register_hook(lambda grad: grad * float("nan")))
        elif hooks:
            hooks.pop().remove()

    hooks: list = []
    with before_steps(ill):
        return _run(root, run_dir, *overrides)


def broken_weights(
    root: Path, run_dir: Path, at: int, times: int, stop_after: int | None, *overrides: str
) -> int | str:
    """Changes the sign of weights before a step, so that its loss leaps up, as often as `times` says."""
    left = times

    def ill(engine: Engine, number: int) -> None:
        nonlocal left
        if number >= at and left:
            left -= 1
            for each in engine.model.module.parameters():
                each.data.mul_(-3.0)

    with before_steps(ill):
        return _run(root, run_dir, *overrides, stop_after=stop_after)


def slow_rank(root: Path, run_dir: Path, rank: int, part: str, *overrides: str) -> int | str:
    """Lets one rank sleep in each step, while it encodes tiles or while it waits for its data."""
    from nvlm_train.data.loading.loader import Loader
    from nvlm_train.vision import tile_parallel

    owner, name = (tile_parallel, "encode_tiles") if part == "compute" else (Loader, "__next__")
    original = getattr(owner, name)

    def slowed(*args):
        if dist.get_rank() == rank:
            time.sleep(1.0)
        return original(*args)

    with mock.patch.object(owner, name, slowed):
        return _run(root, run_dir, *overrides)


def _run(root: Path, run_dir: Path, *overrides: str, stop_after: int | None = None) -> int | str:
    """Trains. Returns the exit code, or the message of the error that ended the run."""
    from nvlm_train.errors import NvlmError

    try:
        return runs.run(root, run_dir, *overrides, stop_after=stop_after)
    except NvlmError as error:
        return str(error)


def optimizer_state(root: Path, run_dir: Path, *overrides: str) -> list[torch.Tensor]:
    """Returns what the newest checkpoint gives this rank in the layout that saved it.

    Weights, the optimizer's own copies, moments and step counts are in it.
    """
    from nvlm_train.parallel import kernels

    recipe = smoke_recipe(root, run_dir, *overrides)
    newest = directory.complete_checkpoints(run_dir)[-1]
    stage = recipe.stages[newest.name.split("-")[0]]
    engine = build_engine(
        recipe, stage, build_topology(stage.parallel, recipe.seed), kernels.detect()
    )
    sharded_state.load(engine, newest, same_layout=False)
    found = [each.data.clone() for each in engine.whole_model().parameters()]
    for part in parts(engine.optimizer):
        for group in [] if part.is_stub_optimizer else part.optimizer.param_groups:
            found.append(torch.tensor(group["step"]))
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                found += [parameter.data.clone(), state["exp_avg"].clone()]
                found.append(state["exp_avg_sq"].clone())
    return found


def spoilt_optimizer(
    root: Path, run_dir: Path, rank: int, kind: str, at: int, *overrides: str
) -> int | str:
    """Makes one value of one rank's optimizer infinite before a step: of its weights or of its moments."""

    left = [at]

    def ill(engine: Engine, number: int) -> None:
        if number not in left or dist.get_rank() != rank:
            return
        left.remove(number)
        (part,) = (each for each in parts(engine.optimizer) if not each.is_stub_optimizer)
        parameter = next(p for group in part.optimizer.param_groups for p in group["params"])
        spoilt = parameter.data if kind == "weights" else part.optimizer.state[parameter][kind]
        # Of a moment, infinity changes no weight.
        spoilt.flatten()[0] = float("nan" if kind == "weights" else "inf")

    with before_steps(ill):
        return _run(root, run_dir, *overrides)


def published(root: Path, run_dir: Path, kind: str, at: int, *overrides: str) -> int | str:
    """Does the same without the check of tensors: the checkpoint is published, and counts as undamaged."""
    from nvlm_train.train.checkpoint import saver, verify

    with (
        mock.patch.object(saver, "not_finite", lambda engine: []),
        mock.patch.object(verify, "_not_finite", lambda checkpoint: []),
    ):
        return spoilt_optimizer(root, run_dir, 0, kind, at, *overrides)


def attempt(root: Path, run_dir: Path, *overrides: str) -> int | str:
    """Trains without any fault. Returns the exit code, or the message that ended the run."""
    return _run(root, run_dir, *overrides)


def broken_encoder(root: Path, run_dir: Path, *overrides: str) -> int | str:
    """Trains with a vision encoder that has a NaN."""
    from nvlm_train.train import engine as engine_module

    original = engine_module.build_vision_encoder

    def build(*args: Any) -> Any:
        encoder = original(*args)
        encoder.encoder["layer"][0].lambda_1.data[0] = float("nan")
        return encoder

    with mock.patch.object(engine_module, "build_vision_encoder", build):
        return _run(root, run_dir, *overrides)
