"""Runs on a worker: how many operators of ATen a microbatch calls, forward and backward."""

from __future__ import annotations

from nvlm_train.batch import StepBatch
from nvlm_train.config.schema import ParallelConfig
from nvlm_train.train.engine import Engine
from nvlm_train.train.placing import place
from nvlm_train.train.step import run_step
from tests.parallel.calls import RecordedCalls
from tests.parity import cross_gradients, cross_recipes, gradients, recipes

FEW, MANY = 4, 8


def of_a_microbatch(name: str) -> float:
    """Returns the calls of a step of eight packs beyond those of a step of four, by pack.

    Args:
        name: "d" for the packs of `recipes`, else of `cross_recipes.ALL`.
    """
    parallel = ParallelConfig()
    own = gradients.start_engine if name == "d" else None
    engine = own(parallel) if own else cross_gradients.start_engine(name, parallel)
    _calls(engine, _batch(engine, name, FEW))
    few, many = (_calls(engine, _batch(engine, name, packs)) for packs in (FEW, MANY))
    return (many - few) / (MANY - FEW)


def _calls(engine: Engine, batch: StepBatch) -> int:
    placed = place(batch, engine.topology)
    with RecordedCalls() as recorded:
        run_step(engine, placed, num_sources=2)
    return len(recorded.names)


def _batch(engine: Engine, name: str, packs: int) -> StepBatch:
    share = engine.topology.share
    if name == "d":
        layouts = [recipes.MIXED[n % len(recipes.MIXED)] for n in range(packs)]
        return recipes.step_batch(layouts, share, 0)
    samples = [cross_recipes.MIXED[n % len(cross_recipes.MIXED)] for n in range(packs)]
    return cross_recipes.step_batch(name, samples, share, 0, 1)
