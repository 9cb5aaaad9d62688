"""Each rule that spans fields, by its message."""

from __future__ import annotations

import pytest

from nvlm_train.config.rules import check
from nvlm_train.errors import ConfigError
from nvlm_train.recipe.load import load_recipe


def problems_of(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_recipe(["experiment=smoke", *overrides])
    return list(caught.value.problems)


def test_tensor_parallelism_divides_heads_and_groups() -> None:
    assert problems_of("stages.sft.parallel.tensor=8") == [
        "stages.sft.parallel.tensor=8 does not divide model.language.num_heads=4; use 1 or 2",
        "stages.sft.parallel.tensor=8 does not divide model.language.num_kv_heads=2; use 1 or 2",
    ]


# smoke: 4 layers, hidden 64, 4 heads, 2 groups; tile 32, patch 8; sequence 128; 4 steps.
BROKEN = {
    "stages.sft.parallel.pipeline=3": "does not divide model.language.num_layers=4; use 1, 2 or 4",
    "stages.sft.parallel.sequence_parallel=true": "needs stages.sft.parallel.tensor above 1",
    "stages.sft.parallel.tensor=0": "stages.sft.parallel.tensor=0 is out of range; use at least 1",
    "stages.sft.parallel.max_tiles_in_flight=0": "out of range",
    "model.vision.patch_size=7": "does not divide model.vision.tile_size=32",
    "model.vision.tile_size=24": "makes 3 patches a side",
    "model.vision.num_heads=5": "model.vision.num_heads=5 does not divide model.vision.hidden_size=32",
    "model.language.num_kv_heads=3": "does not divide model.language.num_heads=4; use 1, 2 or 4",
    "model.language.hidden_size=20": "makes heads of 5 channels; RoPE needs an even number",
    "model.language.vocab_size=0": "model.language.vocab_size=0 is out of range",
    "model.vision.hidden_size=-1": "model.vision.hidden_size=-1 is out of range; use at least 1",
    "model.vision.num_layers=20000000": "num_layers=20000000 is out of range; use from 1 to 10000",
    "model.language.num_layers=20000000": "num_layers=20000000 is out of range; use from 1 to 10000",
    "model.vision.norm_eps=0": "model.vision.norm_eps=0.0 is out of range; use more than 0",
    "model.language.norm_eps=-1": "model.language.norm_eps=-1.0 is out of range; use more than 0",
    "model.language.rope_theta=0": "model.language.rope_theta=0.0 is out of range; use more than 0",
    "model.projector.norm_eps=0": "model.projector.norm_eps=0.0 is out of range; use more than 0",
    "stages.sft.optimizer.min_lr=1": "min_lr=1.0 is above stages.sft.optimizer.lr",
    "stages.sft.optimizer.warmup_steps=4": "does not end before stages.sft.steps=4",
    "stages.sft.optimizer.beta2=1": "use 0 or more and less than 1",
    "stages.sft.optimizer.clip_grad=0": "use more than 0",
    "stages.sft.trainable=[]": "trains nothing",
    "stages.sft.trainable=[projector,projector]": "names a part twice",
    "stages.sft.sequence_length=4": "has no room for one tile of 4 tokens",
    "stages.sft.pack_length=100": "stages.sft.pack_length=100 is below stages.sft.sequence_length=128: a "
    "sample of that length would fit no pack; use at least 128, or null",
    "stages.sft.batch.size=0": "stages.sft.batch.size=0 is out of range",
    "stages.sft.hidden_dropout=1": "use 0 or more and less than 1",
    "schedule=[pretrain,sfft]": "names the stage sfft, which does not exist; use pretrain, sft",
    "schedule=[sft,sft]": "runs sft more than once",
    "schedule=[]": "runs nothing",
    "run_dir=s3://bucket/run": "run_dir=s3://bucket/run is a URL; checkpoints need a file system that "
    "renames directories: use a local or shared directory, and copy checkpoints/STAGE-STEP from there "
    "when its manifest.json exists",
    "checkpoint.max_failed_saves=-1": "checkpoint.max_failed_saves=-1 is out of range; use at least 0",
    "checkpoint.keep_last=0": "checkpoint.keep_last=0 is out of range; use at least 1",
    "loader.max_skipped_fraction=2": "use from 0 to 1",
    "loader.prefetch_steps=0": "out of range",
    "loader.read_attempts=0": "loader.read_attempts=0 is out of range; use at least 1",
    "loader.cache_gib=0": "loader.cache_gib=0.0 is out of range; use more than 0",
    "tracking.log_every=0": "out of range",
    "seed=-1": "seed=-1 is out of range",
}


@pytest.mark.parametrize(("override", "message"), BROKEN.items())
def test_a_broken_rule_is_reported(override: str, message: str) -> None:
    found = problems_of(override)
    assert any(message in problem for problem in found), found


def test_sequence_parallelism_divides_the_sequence() -> None:
    found = problems_of("parallel@stages.sft.parallel=tp2_sp", "stages.sft.sequence_length=127")
    assert found == [
        "stages.sft.parallel.tensor=2 does not divide stages.sft.sequence_length=127; use 1"
    ]


def test_sequence_parallelism_divides_packs_and_not_samples() -> None:
    """What is cut is a pack; a sample stands anywhere in it."""
    layout = "parallel@stages.sft.parallel=tp2_sp"
    odd = "stages.sft.sequence_length=127"
    assert load_recipe(["experiment=smoke", layout, odd, "stages.sft.pack_length=256"])
    assert problems_of(layout, odd, "stages.sft.pack_length=255") == [
        "stages.sft.parallel.tensor=2 does not divide stages.sft.pack_length=255; use 1"
    ]


def test_all_rules_run() -> None:
    found = problems_of("stages.sft.parallel.pipeline=3", "seed=-1", "stages.sft.trainable=[]")
    assert len(found) == 3


def test_stages_that_are_not_scheduled_are_not_judged() -> None:
    assert load_recipe(["experiment=smoke", "schedule=[pretrain]", "stages.sft.trainable=[]"])


def test_the_world_holds_whole_replicas() -> None:
    recipe = load_recipe(["experiment=smoke", "parallel@stages.sft.parallel=tp2_pp2"])
    check(recipe, 4)
    check(recipe, 8)
    with pytest.raises(ConfigError) as caught:
        check(recipe, 6)
    (problem,) = caught.value.problems
    assert problem == (
        "stages.sft.parallel: tensor=2 x pipeline=2 = 4 ranks do not divide the world of 6; "
        "start a multiple of 4 processes or change the layout"
    )
