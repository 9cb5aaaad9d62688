"""Ranks of the 72B and 34B recipes hold what `nvlm_train/costs.py` counts, to the last parameter."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from nvlm_train import costs
from nvlm_train.model.global_weights import part_of
from tests.recipes.shipped import load

ROOT = Path(__file__).parents[2]
NAMES = [f"nvlm_{architecture}_{size}" for size in ("72b", "34b") for architecture in "dxh"]


def measure(name: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.recipes.corners", name],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_ranks_of_a_world_of_128_hold_what_is_counted(name: str) -> None:
    """All pipeline stages of one tensor-parallel rank, and two more corners that hold as much as theirs."""
    expected = Counter(costs.part_parameters(load(name).model))
    found = measure(name)
    assert found["encoder"] == expected.pop("vision_encoder")
    assert set(found["stages"]) == {"pretrain", "sft"}
    for stage in found["stages"].values():
        tensor, pipeline = stage["layout"]
        ranks = {tuple(rank["place"]): rank["parameters"] for rank in stage["ranks"]}
        firsts = [ranks[0, each] for each in range(pipeline)]
        replica: Counter[str] = Counter()
        for parameters in firsts:
            for key, (count, shared_by) in parameters.items():
                replica[part_of(key)] += count * shared_by
        assert replica == expected
        middle, last = (tensor // 2, pipeline // 2), (tensor - 1, pipeline - 1)
        assert set(ranks) == {*((0, each) for each in range(pipeline)), middle, last}
        assert ranks[middle] == firsts[middle[1]] and ranks[last] == firsts[-1]
