"""Writing samples as shards, and the one call that opens them for a stage."""

from __future__ import annotations

import hashlib
import json
from itertools import count
from pathlib import Path

import pytest

from nvlm_train.batch import RankShare
from nvlm_train.config.model_schema import (
    LanguageConfig,
    ModelConfig,
    ProjectorConfig,
    VisionConfig,
)
from nvlm_train.config.schema import BatchConfig, LoaderConfig, OptimizerConfig, Recipe, StageConfig
from nvlm_train.data.dataset import build_data
from nvlm_train.data.loading.loader import Loader
from nvlm_train.data.prepare.write import prepare_shards
from nvlm_train.errors import ShardError
from nvlm_train.tokens import Tokenizer
from tests.data.conftest import mixed_samples


def test_manifest(tmp_path: Path) -> None:
    manifest = prepare_shards(mixed_samples(10, "k"), str(tmp_path / "out"), "train", 4)
    stored = json.loads((tmp_path / "out" / "train.manifest.json").read_text())
    assert (stored["num_samples"], stored["num_images"]) == (10, 9)
    assert [shard["num_samples"] for shard in stored["shards"]] == [4, 4, 2]
    for shard in manifest.shards:
        data = (tmp_path / "out" / shard.file).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.num_bytes, shard.sha256)
    assert manifest.pattern == "train-{000000..000002}.tar"
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()) == [".json", *[".tar"] * 3]


def test_nothing_appears_when_a_source_fails_half_way(tmp_path: Path) -> None:
    samples = [*mixed_samples(5, "k"), ("bad.key", {}, [])]
    with pytest.raises(ShardError, match="key='bad.key'"):
        prepare_shards(samples, str(tmp_path), "train", 2)
    assert list(tmp_path.iterdir()) == []


def recipe_for(tmp_path: Path, tokenizer: Tokenizer) -> tuple[StageConfig, Recipe]:
    """A 32-pixel model's stage over `data/train-*.tar`."""
    (tmp_path / "recipes").mkdir(exist_ok=True)
    (tmp_path / "recipes" / "mix.yaml").write_text(
        "sources:\n- {name: all, shards: 'train-{000000..000002}.tar'}\n"
    )
    stage = StageConfig(
        trainable=("projector",),
        blend="mix",
        steps=1,
        sequence_length=128,
        batch=BatchConfig(size=4),
        optimizer=OptimizerConfig(lr=1.0, min_lr=0.0, warmup_steps=0),
    )
    model = ModelConfig(
        architecture="d",
        vision=VisionConfig(1, 8, 1, 8, tile_size=32, patch_size=8),
        projector=ProjectorConfig(8),
        language=LanguageConfig(1, 8, 1, 1, 8, 512),
        tokenizer=tokenizer.config,
    )
    recipe = Recipe(
        name="r",
        run_dir="runs/r",
        seed=1,
        precision="fp32",
        schedule=("pretrain",),
        stages={"pretrain": stage},
        model=model,
        loader=LoaderConfig(data_root=str(tmp_path / "data")),
    )
    return stage, recipe


def test_from_recipe_to_batch(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prepare_shards(mixed_samples(12, "k"), str(tmp_path / "data"), "train", 4)
    stage, recipe = recipe_for(tmp_path, tokenizer)
    plan, encoder = build_data(stage, recipe, str(tmp_path / "recipes"))
    assert plan.source_names == ("all",) and len(plan.digests) == 3 + 1
    with Loader(plan, encoder, RankShare(), recipe.loader, 64, count()) as loader:
        batch = next(loader)
    assert sum(len(pack.samples) for part in batch.rounds for pack in part.microbatches) == 4


def test_missing_shard(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prepare_shards(mixed_samples(8, "k"), str(tmp_path / "data"), "train", 4)
    stage, recipe = recipe_for(tmp_path, tokenizer)
    with pytest.raises(ShardError) as caught:
        build_data(stage, recipe, str(tmp_path / "recipes"))
    root = tmp_path / "data"
    assert str(caught.value) == (
        f"missing shard={root}/train-000002.tar: blend=mix source=all names train-000002.tar, and "
        f"relative names start at loader.data_root={root}; correct either, or write them with "
        "`nvlm data prepare FORMAT INPUT --out DIR --name all`"
    )
