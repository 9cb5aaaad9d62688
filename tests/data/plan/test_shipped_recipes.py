"""The data recipes that come with the package, what they say about sources, and manifests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nvlm_train.config.paths import data_recipes_dir
from nvlm_train.data.dataset import build_data
from nvlm_train.data.plan.data_recipe import list_shards, read_blend
from nvlm_train.data.prepare.write import prepare_shards
from nvlm_train.data.shards.store import Store
from nvlm_train.errors import ConfigError, ShardError
from tests.data.conftest import chat, draw_image, encoded, mixed_samples
from tests.train.smoke import make_smoke_data, smoke_recipe

SHIPPED = sorted(path.stem for path in data_recipes_dir().glob("*.yaml"))
PAPER = ("nvlm_pretrain", "nvlm_sft", "nvlm_sft_text")


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_loads(name: str) -> None:
    assert read_blend(name, str(data_recipes_dir())).sources


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_sources_say_what_they_are(name: str) -> None:
    blend = read_blend(name, str(data_recipes_dir()))
    assert "weights" in blend.note and "ours" in blend.note
    for source in blend.sources:
        assert source.task and source.layout and source.licence, source.name
        assert source.shards == (f"{source.name}.manifest.json",)


def test_the_papers_sft_holds_the_text_only_sources() -> None:
    directory = str(data_recipes_dir())
    text = read_blend("nvlm_sft_text", directory).sources
    assert len(text) == 12 and set(text) < set(read_blend("nvlm_sft", directory).sources)


def test_a_paper_blend_trains_on_prepared_shards(tmp_path: Path) -> None:
    """Every source of stage 1 under its own name, several shards each, all from manifests."""
    make_smoke_data(tmp_path)
    for number, source in enumerate(read_blend("nvlm_pretrain", str(data_recipes_dir())).sources):
        image = [("jpg", encoded(draw_image(40, 40, number), "JPEG"))]
        samples = [(f"k{n}", chat("what?", source.name), image) for n in range(3)]
        prepare_shards(samples, str(tmp_path / "paper"), source.name, 2)
    recipe = smoke_recipe(
        tmp_path,
        tmp_path,
        "stages.pretrain.blend=nvlm_pretrain",
        f"loader.data_root={tmp_path}/paper",
    )
    plan, _ = build_data(recipe.stages["pretrain"], recipe, str(data_recipes_dir()))
    assert len(plan.sources) == 18
    assert {source.num_samples for source in plan.sources} == {3}
    assert sum(len(source.readers) for source in plan.sources) == 36


def test_a_missing_source_says_how_to_get_it(tmp_path: Path) -> None:
    make_smoke_data(tmp_path)
    recipe = smoke_recipe(
        tmp_path, tmp_path, "stages.sft.blend=nvlm_sft", f"loader.data_root={tmp_path}"
    )
    with pytest.raises(ShardError) as caught:
        build_data(recipe.stages["sft"], recipe, str(data_recipes_dir()))
    message = str(caught.value)
    assert f"missing shard={tmp_path}/coco.manifest.json: blend=nvlm_sft source=coco" in message
    assert "`nvlm data prepare coco INPUT --out DIR --name coco`" in message
    assert "licence: https://cocodataset.org" in message


def test_manifests_name_shards_beside_them(tmp_path: Path) -> None:
    prepare_shards(mixed_samples(5, "k"), str(tmp_path / "root/sub"), "a", 2)
    (tmp_path / "mix.yaml").write_text("sources: [{name: a, shards: [sub/a.manifest.json, b.tar]}]")
    blend = read_blend(str(tmp_path / "mix.yaml"), "")
    (source,) = list_shards(blend, Store(str(tmp_path / "root"))).sources
    names = tuple(f"sub/a-{number:06d}.tar" for number in range(3))
    assert source.shards == (*names, "b.tar")
    (tmp_path / "root/sub/a.manifest.json").write_text('{"shards": 1}')
    with pytest.raises(ShardError, match=r"manifest=.*a.manifest.json cannot be read .*source=a"):
        list_shards(blend, Store(str(tmp_path / "root")))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("layout: lava", "sources[0].layout='lava' must be a format of `nvlm data prepare`: llava"),
        ("task: 3", "sources[0].task=3 must be text"),
        ("licence: ''", "sources[0].licence='' must be text"),
        ("license: x", "unknown key 'license'; did you mean 'licence'?"),
    ],
)
def test_bad_descriptions(tmp_path: Path, keys: str, message: str) -> None:
    (tmp_path / "b.yaml").write_text(f"sources: [{{name: a, shards: a.tar, {keys}}}]\nnote: 1\n")
    with pytest.raises(ConfigError) as caught:
        read_blend("b", str(tmp_path))
    assert message in str(caught.value) and "b.yaml.note=1 must be text" in str(caught.value)


def test_descriptions_decide_nothing(tmp_path: Path) -> None:
    """Text about a source may change while a run goes on."""
    make_smoke_data(tmp_path)
    recipe = smoke_recipe(tmp_path, tmp_path)
    plan, _ = build_data(recipe.stages["sft"], recipe, "")
    described = (tmp_path / "blend.yaml").read_text().replace('"weight"', '"task": "t", "weight"')
    (tmp_path / "other.yaml").write_text(described)
    stage = replace(recipe.stages["sft"], blend=str(tmp_path / "other.yaml"))
    assert build_data(stage, recipe, "")[0].fingerprint == plan.fingerprint
