"""Every recipe of real size trains two steps a stage as its twin, in its own kind of layout."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from nvlm_train.config import rules
from tests.recipes import twin_runs
from tests.recipes.shipped import NAMES, load
from tests.recipes.twin import twin_of, world_of, write_tokenizer
from tests.train.smoke import make_smoke_data, read_metrics
from tests.workers import WorkerPool

FAST = "nvlm_x_2b"
"""One process; tied tables, cross-attention, two KV groups."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("twins")
    make_smoke_data(root)
    write_tokenizer(root)
    return root


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=[] if each == FAST else pytest.mark.slow) for each in NAMES]
)
def test_a_twin_trains(workers: WorkerPool, data: Path, tmp_path: Path, name: str) -> None:
    twin = twin_of(load(name), data, tmp_path / "run")
    world = world_of(twin)
    rules.check(twin, world)
    assert workers.run(world, twin_runs.run, twin) == [0] * world
    records = read_metrics(tmp_path / "run")
    assert [record["stage"] for record in records] == ["pretrain"] * 2 + ["sft"] * 2
    assert all(math.isfinite(record["loss"]) for record in records)
    assert all(record["grad_norm"] > 0 and record["tiles"] > 0 for record in records)


@pytest.mark.parametrize("name", ["nvlm_d_72b", "nvlm_x_34b", "nvlm_h_8b", "nvlm_d_smollm2"])
def test_a_twin_is_the_recipe_made_small(tmp_path: Path, name: str) -> None:
    """Whatever is no size, and no length of the run, is the recipe's."""
    recipe, twin = load(name), twin_of(load(name), tmp_path, tmp_path)
    assert set(differences(recipe.model, twin.model)) <= {
        "vision", "language", "tokenizer", "projector", "cross_attention"
    }  # fmt: skip
    assert set(differences(recipe.model.language, twin.model.language)) <= {
        "num_layers", "hidden_size", "num_heads", "num_kv_heads", "ffn_hidden_size", "vocab_size"
    }  # fmt: skip
    for stage, small in zip(recipe.stages.values(), twin.stages.values(), strict=True):
        assert set(differences(stage, small)) <= {
            "blend", "steps", "sequence_length", "pack_length", "batch", "optimizer", "parallel"
        }  # fmt: skip
        assert set(differences(stage.optimizer, small.optimizer)) <= {"warmup_steps"}
        assert (stage.parallel.tensor > 1) == (small.parallel.tensor > 1)
        assert (stage.parallel.pipeline > 1) == (small.parallel.pipeline > 1)
    assert twin == twin_of(load(name), tmp_path, tmp_path)


def differences(one: object, other: object) -> Iterator[str]:
    assert type(one) is type(other)
    for each in fields(one):  # type: ignore[arg-type]
        if getattr(one, each.name) != getattr(other, each.name):
            yield each.name
