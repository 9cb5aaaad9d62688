"""state.json: what it holds, and which changed recipes may go on."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from nvlm_train.config.load import load_recipe
from nvlm_train.config.schema import Recipe
from nvlm_train.errors import CheckpointError
from nvlm_train.train.state import (
    FILE_NAME,
    RunState,
    check_resumable,
    library_versions,
    plain_recipe,
    read_state,
    write_state,
)

RUN = Path("runs/x/checkpoints/sft-00000002")


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(["experiment=smoke"])


def state_of(recipe: Recipe, stage: str = "sft", step: int = 2) -> RunState:
    return RunState(
        stage=stage,
        step=step,
        recipe=plain_recipe(recipe),
        layout=(2, 2, 1),
        shard_digests={"a.tar": "00"},
        weights_fingerprint={"projector": 1.5, "language_model": 2.5},
        wandb_run_id=None,
        versions=library_versions(),
    )


def refusal(state: RunState, recipe: Recipe) -> str:
    with pytest.raises(CheckpointError) as caught:
        check_resumable(state, recipe, RUN)
    return str(caught.value)


def change(recipe: Recipe, stage: str, **fields: Any) -> Recipe:
    """The recipe with other fields in one stage."""
    return replace(recipe, stages={**recipe.stages, stage: replace(recipe.stages[stage], **fields)})


def test_round_trip(recipe: Recipe, tmp_path: Path) -> None:
    state = state_of(recipe)
    write_state(state, tmp_path)
    assert read_state(tmp_path) == state
    assert set(state.versions) == {"nvlm-train", "torch", "megatron-core"}
    check_resumable(read_state(tmp_path), recipe, RUN)


def test_another_format_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    stored = asdict(state_of(recipe)) | {"format": 99}
    (tmp_path / FILE_NAME).write_text(json.dumps(stored))
    with pytest.raises(CheckpointError, match="format=99, this version reads 1"):
        read_state(tmp_path)


def test_what_may_change(recipe: Recipe) -> None:
    """Layout, optimizer, length of training, saving and tracking; and all of a stage that is over."""
    stage = recipe.stages["sft"]
    longer = change(
        recipe,
        "sft",
        steps=stage.steps + 10,
        parallel=replace(stage.parallel, tensor=2),
        optimizer=replace(stage.optimizer, lr=1.0),
    )
    free = replace(
        longer, run_dir="elsewhere", checkpoint=replace(recipe.checkpoint, interval_steps=1)
    )
    check_resumable(state_of(recipe), change(free, "pretrain", sequence_length=256), RUN)


def test_every_difference_is_named_with_both_values(recipe: Recipe) -> None:
    stage = recipe.stages["sft"]
    changed = change(
        recipe,
        "sft",
        trainable=("projector",),
        sequence_length=256,
        tiling=replace(stage.tiling, max_tiles=2),
    )
    vision = replace(recipe.model.vision, num_layers=3)
    changed = replace(changed, seed=5, model=replace(recipe.model, vision=vision))
    message = refusal(state_of(recipe), changed)
    for line in (
        f"model.vision.num_layers=3, was {recipe.model.vision.num_layers}",
        f"seed=5, was {recipe.seed}",
        "stages.sft.trainable=['projector'], was ['projector', 'cross_attention', 'language_model']",
        f"stages.sft.sequence_length=256, was {stage.sequence_length}",
        f"stages.sft.tiling.max_tiles=2, was {stage.tiling.max_tiles}",
    ):
        assert f"  - {line}\n" in message
    assert message.count("  - ") == 5
    assert str(RUN) in message and "another run_dir" in message


def test_the_model_may_not_change_between_stages(recipe: Recipe) -> None:
    projector = replace(recipe.model.projector, ffn_hidden_size=8)
    changed = replace(recipe, model=replace(recipe.model, projector=projector))
    end = state_of(recipe, "pretrain", recipe.stages["pretrain"].steps)
    check_resumable(end, recipe, RUN)
    assert "model.projector.ffn_hidden_size=8" in refusal(end, changed)


def test_a_stage_that_is_gone(recipe: Recipe) -> None:
    only = replace(recipe, schedule=("pretrain",), stages={"pretrain": recipe.stages["pretrain"]})
    assert "is in stage sft, which the recipe's schedule does not have" in refusal(
        state_of(recipe), only
    )
