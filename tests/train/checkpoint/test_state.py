"""state.json: what it holds, which formats are read, and which changed recipes may go on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from nvlm_train.config.schema import Recipe
from nvlm_train.errors import CheckpointError, FormatError
from nvlm_train.recipe.load import load_recipe
from nvlm_train.train.checkpoint.resume import (
    TO_READ,
    TO_TRAIN,
    Rule,
    check_resumable,
    with_defaults,
)
from nvlm_train.train.checkpoint.run_state import (
    FILE_NAME,
    RunState,
    library_versions,
    plain_recipe,
    read_state,
    write_state,
)

RUN = Path("runs/x/checkpoints/sft-00000002")
FIRST_FORMAT = {
    "stage", "step", "recipe", "layout", "shard_digests", "weights_fingerprint", "wandb_run_id",
    "versions", "format",
}  # fmt: skip


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


def check(state: RunState, recipe: Recipe, rules: Sequence[Rule] = TO_TRAIN) -> None:
    check_resumable(state, recipe, RUN, rules)


def refusal(state: RunState, recipe: Recipe) -> str:
    with pytest.raises(CheckpointError) as caught:
        check(state, recipe)
    return str(caught.value)


def change(recipe: Recipe, stage: str, **fields: Any) -> Recipe:
    """Returns the recipe with other fields in one stage."""
    return replace(recipe, stages={**recipe.stages, stage: replace(recipe.stages[stage], **fields)})


def test_round_trip(recipe: Recipe, tmp_path: Path) -> None:
    state = state_of(recipe)
    write_state(state, tmp_path)
    assert read_state(tmp_path) == state
    assert set(state.versions) == {"nvlm-train", "torch", "megatron-core"}
    check(read_state(tmp_path), recipe)


def test_another_format_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    stored = asdict(state_of(recipe)) | {"format": 99}
    (tmp_path / FILE_NAME).write_text(json.dumps(stored))
    with pytest.raises(
        FormatError, match=r"format=99, this version reads 1, 2, 3; .* wrote it \(0"
    ):
        read_state(tmp_path)


def test_the_first_format_is_read_and_goes_on(recipe: Recipe, tmp_path: Path) -> None:
    """It is as commits before this test wrote it. Fields that recipes got later have their defaults."""
    stored = asdict(state_of(recipe)) | {"format": 1}
    for name in set(stored) - FIRST_FORMAT:
        del stored[name]
    del stored["recipe"]["format"], stored["recipe"]["health"]
    del stored["recipe"]["model"]["language"]["qkv_bias"]
    del stored["recipe"]["stages"]["sft"]["tiling"]["thumbnail"]
    (tmp_path / FILE_NAME).write_text(json.dumps(stored))
    state = read_state(tmp_path)
    assert state.format == 1 and state.position.step == 2
    check(state, recipe)
    language = replace(recipe.model.language, qkv_bias=False)
    changed = replace(recipe, model=replace(recipe.model, language=language))
    assert "model.language.qkv_bias=False, was True" in refusal(state, changed)


def test_a_stored_recipe_with_its_defaults_is_itself(recipe: Recipe) -> None:
    plain = plain_recipe(recipe)
    assert with_defaults(Recipe, plain) == plain


def test_what_may_change(recipe: Recipe) -> None:
    """Layout, optimizer, length of training, saving and tracking may change; finished stages entirely."""
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
    check(state_of(recipe), change(free, "pretrain", sequence_length=256))


def test_every_difference_is_named_with_both_values(recipe: Recipe) -> None:
    stage = recipe.stages["sft"]
    changed = change(
        recipe,
        "sft",
        trainable=("projector",),
        sequence_length=256,
        pack_length=512,
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
        "stages.sft.pack_length=512, was None",
        f"stages.sft.tiling.max_tiles=2, was {stage.tiling.max_tiles}",
    ):
        assert f"  - {line}\n" in message
    assert message.count("  - ") == 6
    assert str(RUN) in message and "another run_dir" in message


def test_the_model_may_not_change_between_stages(recipe: Recipe) -> None:
    projector = replace(recipe.model.projector, ffn_hidden_size=8)
    changed = replace(recipe, model=replace(recipe.model, projector=projector))
    end = state_of(recipe, "pretrain", recipe.stages["pretrain"].steps)
    check(end, recipe)
    assert "model.projector.ffn_hidden_size=8" in refusal(end, changed)


def test_the_encoder_s_batch_counts_and_not_who_states_it(recipe: Recipe) -> None:
    """Recipes of before stated 8 tiles, which is what follows from InternViT-6B's sizes today."""
    large = {"hidden_size": 3200, "num_heads": 25, "ffn_hidden_size": 12800}
    sizes = large | {"tile_size": 448, "patch_size": 14}

    def taking(tiles: int | None) -> Recipe:
        vision = replace(recipe.model.vision, batch_tiles=tiles, **sizes)
        return replace(recipe, model=replace(recipe.model, vision=vision))

    check(state_of(taking(8)), taking(None))
    check(state_of(taking(None)), taking(8))
    assert "model.vision.batch_tiles=8, was 16" in refusal(state_of(taking(16)), taking(None))


def test_a_stage_that_is_gone(recipe: Recipe) -> None:
    only = replace(recipe, schedule=("pretrain",), stages={"pretrain": recipe.stages["pretrain"]})
    assert "is in stage sft, which schedule=['pretrain'] does not have" in refusal(
        state_of(recipe), only
    )


def test_a_stage_that_is_over_stays_as_it_was(recipe: Recipe) -> None:
    """More steps of it, fewer, or a schedule without it: steps of the run are counted through it."""
    state = state_of(recipe)
    for steps in (2, 8):
        message = refusal(state, change(recipe, "pretrain", steps=steps))
        assert f"stages.pretrain.steps={steps}, and stage pretrain ended after 4" in message
    message = refusal(state, replace(recipe, schedule=("sft",)))
    assert "schedule=['sft'], and the run came through ['pretrain'] to sft" in message
    check(state, replace(recipe, schedule=("sft",)), TO_READ)


def test_a_stage_has_no_fewer_steps_than_were_done(recipe: Recipe) -> None:
    state = state_of(recipe)
    assert "stages.sft.steps=1, and 2 are done; 2 ends the stage here" in refusal(
        state, change(recipe, "sft", steps=1)
    )
    for steps in (2, 3, 99):
        check(state, change(recipe, "sft", steps=steps))
    end = state_of(recipe, "pretrain", 4)
    check(end, change(recipe, "pretrain", steps=8))  # nothing came after it yet


def test_what_the_weights_were_rounded_to_stays(recipe: Recipe) -> None:
    """A load in another precision would find other sums than were saved, and call it damage."""
    changed = replace(recipe, precision="bf16")
    assert "precision=bf16, was fp32" in refusal(state_of(recipe), changed)
    with pytest.raises(CheckpointError, match="precision=bf16, was fp32"):
        check(state_of(recipe, step=4), changed, TO_READ)


def test_a_half_done_stage_keeps_its_kind_of_optimizer(recipe: Recipe) -> None:
    parallel = replace(recipe.stages["sft"].parallel, distributed_optimizer=False)
    changed = change(recipe, "sft", parallel=parallel)
    message = refusal(state_of(recipe), changed)
    assert "stages.sft.parallel.distributed_optimizer=False, was True" in message
    check(state_of(recipe), changed, TO_READ)
    check(state_of(recipe, "pretrain", 4), changed)  # the next stage's optimizer is new


def test_generators_go_on_where_they_are_whole(recipe: Recipe) -> None:
    """They go on in the same layout on the same kind of device; format 1 had one seed for all replicas."""
    state = replace(state_of(recipe), device="cpu")
    assert state.has_generators_for((2, 2, 1), "cpu")
    assert not state.has_generators_for((2, 2, 1), "cuda")
    assert not state.has_generators_for((2, 1, 2), "cpu")
    assert not replace(state, format=1, device=None).has_generators_for((2, 2, 1), "cpu")


def test_later_stages_may_be_added(recipe: Recipe) -> None:
    state = state_of(recipe)
    longer = replace(
        recipe,
        schedule=("pretrain", "sft", "more"),
        stages={**recipe.stages, "more": recipe.stages["sft"]},
    )
    check(state, longer)


def test_tags_of_a_half_done_stage_without_thumbnails_are_not_changed_under_it(
    recipe: Recipe,
) -> None:
    """Until format 2 the last tile had the thumbnail's tag, which has as many tokens."""
    tiling = replace(recipe.stages["sft"].tiling, thumbnail=False)
    without = change(recipe, "sft", tiling=tiling)
    old = replace(state_of(without), format=1)
    message = "stages.sft.tiling.thumbnail=false: the stage was trained with its last tile tagged"
    assert message in refusal(old, without) and "wrote the checkpoint" in refusal(old, without)
    check(state_of(without), without)
    over = replace(old, step=4)
    check(over, without)
    with pytest.raises(CheckpointError, match="the stage was trained with its last tile tagged"):
        check(over, without, TO_READ)  # a question would have other tags than the training
    untagged = change(recipe, "sft", tiling=replace(tiling, tags="none"))
    check(replace(state_of(untagged), format=1), untagged)
