"""Counting the packs of a stage's windows ahead, in parallel, so that any of its steps is found at once."""

from __future__ import annotations

from collections.abc import Iterator

from nvlm_train.config.schema import Recipe
from nvlm_train.data.dataset import build_data
from nvlm_train.data.plan.plan import DataPlan
from nvlm_train.data.processes import processes

_CHUNK = 32
"""Windows of one task."""
_CHUNKS_AT_ONCE = 8
"""Tasks of each process between two looks at whether the table is long enough."""


def count_ahead(
    plan: DataPlan, recipe: Recipe, stage: str, recipes_dir: str, num_workers: int
) -> Iterator[int]:
    """Fills the stage's table of packs up to its last step; yields the packs counted so far."""
    table, needed = plan.packs_before, recipe.stages[stage].steps * plan.batch.size
    total = plan.num_windows
    with processes(num_workers, _start_plan, recipe, stage, recipes_dir) as pool:
        while table.before(table.num_windows) < needed:
            first, size = table.num_windows, _CHUNK * _CHUNKS_AT_ONCE * num_workers
            last = first + size if total is None else min(first + size, total)
            if last <= first:
                return
            starts = range(first, last, _CHUNK)
            stops = [min(start + _CHUNK, last) for start in starts]
            counts = list(pool.map(_count, starts, stops))
            table.extend([count for chunk in counts for count in chunk])
            yield table.before(table.num_windows)


_plans: list[DataPlan] = []


def _start_plan(recipe: Recipe, stage: str, recipes_dir: str) -> None:
    _plans.append(build_data(recipe.stages[stage], recipe, recipes_dir)[0])


def _count(start: int, stop: int) -> list[int]:
    return [_plans[0].count_packs(window) for window in range(start, stop)]
