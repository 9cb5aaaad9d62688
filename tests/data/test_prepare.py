"""Writing shards from foreign layouts, and the one call that opens them for a stage."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from nvlm_train.batch import RankShare
from nvlm_train.config.schema import (
    BatchConfig,
    LanguageConfig,
    LoaderConfig,
    ModelConfig,
    OptimizerConfig,
    ProjectorConfig,
    Recipe,
    StageConfig,
    VisionConfig,
)
from nvlm_train.data.assemble import build_data
from nvlm_train.data.import_formats import read_jsonl, read_llava
from nvlm_train.data.loader import Loader
from nvlm_train.data.prepare import prepare_shards
from nvlm_train.errors import SampleError, ShardError
from nvlm_train.tokens import Tokenizer
from tests.data.conftest import chat, encoded, mixed_samples, picture


@pytest.fixture
def llava(tmp_path: Path) -> Path:
    """A LLaVA-style folder: one image, two images, none."""
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.jpg"):
        image_format = "PNG" if name.endswith("png") else "JPEG"
        (tmp_path / "images" / name).write_bytes(encoded(picture(40, 30), image_format))
    items = [
        {"id": "x.1", "image": "a.png", **chat("<image>\nq", "a")},
        {"id": "x.1", "images": ["a.png", "b.jpg"], **chat("<image><image>\nq", "a")},
        chat("q", "a"),
    ]
    (tmp_path / "data.json").write_text(json.dumps(items))
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(item) for item in items) + "\n\n")
    return tmp_path


def test_both_readers_make_the_same_samples(llava: Path) -> None:
    images = str(llava / "images")
    samples = list(read_llava(str(llava / "data.json"), images))
    assert samples == list(read_jsonl(str(llava / "data.jsonl"), images))
    assert [[suffix for suffix, _ in sample[2]] for sample in samples] == [
        ["png"], ["0.png", "1.jpg"], []
    ]  # fmt: skip
    assert len({key for key, _, _ in samples}) == 3 and "images" not in samples[1][1]


def test_missing_and_unknown_images(llava: Path) -> None:
    (llava / "data.json").write_text(json.dumps([{"image": "z.png", **chat("q", "a")}]))
    with pytest.raises(SampleError, match=r"sample=000000000 .*image=.*z.png does not exist"):
        list(read_llava(str(llava / "data.json"), str(llava / "images")))
    (llava / "data.json").write_text(json.dumps([{"image": "z.psd", **chat("q", "a")}]))
    with pytest.raises(SampleError, match=r"image=z.psd: the suffix must be one of jpg, "):
        list(read_llava(str(llava / "data.json"), str(llava / "images")))
    (llava / "data.json").write_text("{}")
    with pytest.raises(ValueError, match="must be a JSON list"):
        list(read_llava(str(llava / "data.json"), str(llava / "images")))


def test_jsonl_names_the_bad_line(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"caption": "a"}\n\n{"caption"\n')
    with pytest.raises(ValueError, match=r"x.jsonl: line 3 is not JSON"):
        list(read_jsonl(str(tmp_path / "x.jsonl"), str(tmp_path)))


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
    with Loader(plan, encoder, RankShare(), recipe.loader, 64) as loader:
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
