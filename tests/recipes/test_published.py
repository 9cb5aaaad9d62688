"""Recipes of real sizes against what was published: parameters, Tables 10 and 11 of NVLM 1.0."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from nvlm_train import costs, geometry
from nvlm_train.config.paths import recipes_dir
from nvlm_train.config.schema import StageConfig
from tests.recipes.shipped import NAMES, load, table

PUBLISHED = {
    ("nvlm_d_72b", "language_model"): 72_706_203_648,
    ("nvlm_d_34b", "language_model"): 34_388_917_248,
    ("nvlm_d_8b", "language_model"): 7_615_616_512,
    ("nvlm_d_2b", "language_model"): 1_543_714_304,
    ("nvlm_d_smollm2", "language_model"): 134_515_008,
}
"""What the models' pages on the hub count, to the last parameter; tied tables count once."""
DUMMY_HEADS = 7
"""NVLM-D-72B's encoder is stored with so many heads of zeros beside its 25 (modeling_intern_vit.py)."""


@pytest.mark.parametrize(("name", "part"), PUBLISHED)
def test_parameters_are_those_of_the_published_models(name: str, part: str) -> None:
    assert costs.part_parameters(load(name).model)[part] == PUBLISHED[name, part]


def test_parameters_of_nvlm_d_72b() -> None:
    """78.86 B, of which 5.54 B see; 79.4 B on its page, because the encoder's dummy heads lie in the file."""
    model = load("nvlm_d_72b").model
    parts = costs.part_parameters(model)
    total, vision = sum(parts.values()), model.vision
    assert round(parts["vision_encoder"] / 1e9, 2) == 5.54
    assert round(total / 1e9, 2) == 78.86
    channels = DUMMY_HEADS * vision.hidden_size // vision.num_heads
    # Rows of queries, keys and values, columns of the output projection, and both norms.
    dummies = vision.num_layers * (4 * channels * vision.hidden_size + 2 * channels)
    assert round((total + dummies) / 1e9, 2) == 79.38


def test_each_language_model_and_encoder_has_its_published_size() -> None:
    assert {
        name: round(costs.language_parameters(load(name).model.language) / 1e9, 2)
        for name in ("nvlm_h_72b", "nvlm_x_34b")
    } == {"nvlm_h_72b": 72.71, "nvlm_x_34b": 34.39}
    for name in ("nvlm_d_8b", "nvlm_d_2b"):
        # OpenGVLab's page of InternViT-300M says 304 M.
        assert round(costs.vision_parameters(load(name).model.vision) / 1e6) == 304


# Batch, max LR, min LR, warm-up, beta2, weight decay, clip, sequence, tiles, thumbnail, TP, PP, steps.
TABLE_10 = {
    "d": (2048, 1e-4, 2.5e-5, 500, 0.95, 0.1, 10, 512, 1, 8, 1, 20_000),
    "x": (2048, 1e-4, 1e-5, 1000, 0.95, 0.05, 1, 512, 1, 8, 1, 20_000),
    "h": (2048, 1e-4, 1e-5, 1000, 0.98, 0.05, 1, 512, 6, 8, 1, 20_000),
}
TABLE_11 = {
    "d_72b": (128, 2e-6, 2.5e-7, 1000, 0.98, 0.1, 10, 3200, 6, 8, 4, 40_000),
    "d_34b": (128, 2e-6, 2.5e-7, 1000, 0.98, 0.1, 10, 3200, 6, 8, 4, 40_000),
    "x_72b": (256, 1e-5, 1e-7, 500, 0.98, 0.05, 1, 1024, 6, 8, 1, 20_000),
    "x_34b": (512, 1e-5, 1e-6, 500, 0.98, 0.05, 1, 1024, 6, 8, 1, 20_000),
    "h_72b": (256, 1e-5, 1e-7, 1000, 0.98, 0.05, 1, 1280, 6, 8, 1, 40_000),
    "h_34b": (256, 1e-5, 1e-7, 1000, 0.98, 0.05, 1, 1280, 6, 8, 1, 40_000),
}
DEEPER = ("x_72b", "h_72b")
"""With the paper's PP1 their SFT does not fit 80 GB."""


def of(stage: StageConfig) -> tuple[float, ...]:
    optimizer, layout = stage.optimizer, stage.parallel
    assert optimizer.beta1 == 0.9 and stage.tiling.thumbnail
    return (
        stage.batch.size, optimizer.lr, optimizer.min_lr, optimizer.warmup_steps, optimizer.beta2,
        optimizer.weight_decay, optimizer.clip_grad, stage.sequence_length, stage.tiling.max_tiles,
        layout.tensor, layout.pipeline, stage.steps,
    )  # fmt: skip


@pytest.mark.parametrize("name", TABLE_11)
def test_recipes_are_the_papers_tables(name: str) -> None:
    recipe = load(f"nvlm_{name}")
    assert recipe.precision == "bf16" and recipe.schedule == ("pretrain", "sft")
    pretrain, sft = recipe.stages["pretrain"], recipe.stages["sft"]
    assert of(pretrain) == TABLE_10[name[0]]
    if name in DEEPER:
        assert sft.parallel.pipeline == 2
        sft = replace(sft, parallel=replace(sft.parallel, pipeline=1))
    assert of(sft) == TABLE_11[name]
    assert "language_model" not in pretrain.trainable and "language_model" in sft.trainable
    assert costs.num_cross_layers(recipe.model) == (0 if name[0] == "d" else 10)
    assert recipe.model.tokenizer.template == ("yi" if "34b" in name else "qwen2")


TEXT, CAPTION, TILES = 280, 80, 4
"""Tokens of text of a sample of SFT and of pretraining, and tiles of an image of a page: docs/recipes.md."""


def tokens_of_a_sample(name: str, stage: StageConfig) -> int:
    """What a sample takes in the decoder, by the assumption of docs/recipes.md."""
    tiles = min(TILES, stage.tiling.max_tiles)
    in_decoder = {"d": tiles, "x": 0, "h": 1}[name.split("_")[1]]
    text = CAPTION if stage.prompts == "pretrain" else TEXT
    return min(stage.sequence_length, text + 256 * in_decoder)


@pytest.mark.parametrize("name", NAMES)
def test_packs_feed_every_pipeline_stage_of_every_replica(name: str) -> None:
    """Longer packs are fewer. Each data-parallel rank needs one for each of its pipeline's stages."""
    world = table.Shipped.read(name).world_size
    for stage in load(name).stages.values():
        if "smollm2" in name:
            assert stage.pack_length is None, "a laptop gains nothing from them"
            continue
        assert stage.pack_length is not None and stage.pack_length in (2048, 4096, 8192)
        packs = stage.batch.size * tokens_of_a_sample(name, stage) / stage.pack_length
        assert packs >= table.data_size(stage, world) * stage.parallel.pipeline
        lengths = geometry.pack_lengths(stage)
        assert all(length % stage.parallel.tensor == 0 for length in lengths)


@pytest.mark.parametrize("name", [f"nvlm_{each}" for each in DEEPER])
def test_a_file_says_why_its_layout_is_not_the_papers(name: str) -> None:
    """Its comment has both numbers; 80 GB have no room for activations beside the first."""
    shipped = table.Shipped.read(name)
    text = (recipes_dir() / "experiment" / f"{name}.yaml").read_text()
    said = re.search(
        r"\(parallel@stages\.sft\.parallel=(\w+)\): ([\d.]+) GB a rank on (\d+) GPUs", text
    )
    deeper = re.search(r"with PP2 it is ([\d.]+) GB", text)
    assert said is not None and deeper is not None and int(said[3]) == shipped.world_size
    stages = [
        shipped.load(f"parallel@stages.sft.parallel={said[1]}").stages["sft"],
        load(name).stages["sft"],
    ]
    found = [
        costs.rank_memory(
            load(name).model, stage, "bf16", table.data_size(stage, shipped.world_size)
        )
        for stage in stages
    ]
    assert [f"{bytes_ / 1e9:.1f}" for bytes_ in found] == [said[2], deeper[1]]
    assert found[0] > 0.9 * 80e9 and found[1] < 0.6 * 80e9


@pytest.mark.parametrize("name", [f"nvlm_{each}" for each in TABLE_11])
def test_no_published_recipe_needs_recomputation(name: str) -> None:
    """Weights, optimizer and the activations of full packs leave a fifth of 80 GB to everything else."""
    world_size = table.Shipped.read(name).world_size
    recipe = load(name)
    for stage in recipe.stages.values():
        assert stage.parallel.recompute == "none"
        data_size = table.data_size(stage, world_size)
        needed = costs.rank_memory(recipe.model, stage, "bf16", data_size)
        assert needed + costs.activation_bytes(recipe.model, stage, "bf16") < 0.8 * 80e9


ABLATIONS = {
    "nvlm_d_34b_low_resolution": (20_000, 128, 1, "none"),
    "nvlm_d_34b_no_tags": (20_000, 128, 6, "none"),
    "nvlm_d_34b_2d_grid_tags": (20_000, 128, 6, "2d_grid"),
    "nvlm_d_34b_2d_bbox_tags": (20_000, 128, 6, "2d_bbox"),
    "nvlm_d_34b_1d_tags": (20_000, 128, 6, "1d"),
    "nvlm_d_34b_llava_data": (20_000, 128, 6, "1d"),
    "nvlm_x_34b_low_resolution": (10_000, 512, 1, "none"),
    "nvlm_x_34b_no_tags": (10_000, 512, 6, "none"),
    "nvlm_x_34b_1d_tags": (10_000, 512, 6, "1d"),
    "nvlm_x_34b_frozen": (20_000, 512, 6, "1d"),
    "nvlm_x_72b_frozen": (20_000, 256, 6, "1d"),
}
"""Steps and batch of SFT, tiles, tags (Tables 1, 2, 5 and 9)."""


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_differs_in_what_its_table_says(name: str) -> None:
    recipe, base = load(name), load("_".join(name.split("_")[:3]))
    sft, pretrain = recipe.stages["sft"], recipe.stages["pretrain"]
    assert (
        sft.steps, sft.batch.size, sft.tiling.max_tiles, sft.tiling.tags
    ) == ABLATIONS[name]  # fmt: skip
    assert recipe.model == base.model
    frozen, llava = name.endswith("_frozen"), name.endswith("_llava_data")
    assert ("language_model" in sft.trainable) != frozen
    assert replace(pretrain, blend="") == replace(base.stages["pretrain"], blend="")
    assert pretrain.blend == ("llava_pretrain" if llava else "nvlm_pretrain")
    layout = base.stages["sft"].parallel
    if frozen:
        # Without an optimizer of the language model the paper's layout fits at 72B, too.
        assert (sft.parallel.tensor, sft.parallel.pipeline) == (8, 1)
        assert costs.rank_memory(recipe.model, sft, "bf16", 16) < 0.6 * 80e9
        layout = replace(layout, pipeline=1)
    assert sft.parallel == layout
    same = replace(
        sft,
        steps=0,
        tiling=base.stages["sft"].tiling,
        trainable=(),
        parallel=base.stages["sft"].parallel,
    )
    assert same == replace(base.stages["sft"], steps=0, trainable=())


def test_all_ablations_are_here() -> None:
    assert set(ABLATIONS) == set(table.ablations())
    assert set(NAMES) == {*ABLATIONS, *table.RECIPES}
    lines = (table.PAGE.parents[1] / "launch" / "paper_ablations.txt").read_text().splitlines()
    queued = [line.removeprefix("experiment=") for line in lines if not line.startswith("#")]
    assert sorted(queued) == sorted(name for name in ABLATIONS if "34b" in name)
