"""`nvlm data index` end to end: processes, what is read again and what is not, errors by name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

import pytest
import yaml

from nvlm_train.cli import main
from nvlm_train.config.paths import data_recipes_dir
from nvlm_train.data.dataset import build_data
from nvlm_train.data.prepare.write import prepare_shards
from nvlm_train.data.shards.tar import LocalShard
from nvlm_train.recipe.load import load_recipe
from nvlm_train.tokens import Tokenizer
from tests.data.conftest import mixed_samples


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three shards of four samples, and a data recipe of them."""
    prepare_shards(mixed_samples(12, "k"), str(tmp_path), "s", 4)
    source = {"name": "s", "shards": "s-{000000..000002}.tar"}
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump({"sources": [source]}))
    return tmp_path


def overrides(root: Path, tokenizer: Tokenizer, *more: str) -> list[str]:
    """A recipe of two stages with different encodings on the data."""
    return [
        "experiment=smoke", f"run_dir={root}/run", f"loader.data_root={root}",
        f"model.tokenizer.path={tokenizer.config.path}", f"stages.pretrain.blend={root}/mix.yaml",
        f"stages.sft.blend={root}/mix.yaml", "stages.pretrain.tiling.max_tiles=2",
        "stages.pretrain.batch.unit=packs", "stages.pretrain.batch.window=8", *more,
    ]  # fmt: skip


def test_patterns_alone(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pattern = f"{root}/s-{{000000..000002}}.tar"
    assert main(["data", "index", pattern, "--workers", "2"]) == 0
    assert capsys.readouterr().out.startswith("12 samples in 3 shard(s)")
    assert len(list(root.glob("*.index"))) == 3 and not list(root.glob("*.lengths-*"))


def test_lengths_of_each_stage_and_nothing_read_again(
    root: Path,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["data", "index", *overrides(root, tokenizer), "--workers", "1"]
    assert main(arguments) == 0
    assert "0 shard(s) were indexed already" in capsys.readouterr().out
    assert len(list(root.glob("*.lengths-*"))) == 6 and len(list(root.glob("*.packs-*"))) == 1
    monkeypatch.setattr(LocalShard, "open", None)
    monkeypatch.setattr(LocalShard, "read", None)
    assert main(arguments) == 0
    assert "3 shard(s) were indexed already" in capsys.readouterr().out
    recipe = load_recipe(overrides(root, tokenizer))
    plan, _ = build_data(recipe.stages["pretrain"], recipe, str(data_recipes_dir()))
    monkeypatch.setattr(plan, "count_packs", None)
    plan.packs_before._count_packs = plan.count_packs
    assert plan.step(3, 2).step == 3


def test_only_the_changed_shard_is_read(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["data", "index", f"{root}/mix.yaml", "--data-root", str(root), "--workers", "1"]
    assert main(arguments) == 0
    os.utime(root / "s-000001.tar", ns=(1, 1))
    opened: list[str] = []

    def noted(shard: LocalShard) -> IO[bytes]:
        opened.append(shard.path)
        return Path(shard.path).open("rb")

    monkeypatch.setattr(LocalShard, "open", noted)
    assert main(arguments) == 0
    assert opened == [f"{root}/s-000001.tar"]
    assert "2 shard(s) were indexed already" in capsys.readouterr().out


@pytest.mark.slow
def test_bad_shards_are_all_named_and_the_others_indexed(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torn = root / "s-000000.tar"
    torn.write_bytes(torn.read_bytes()[:2000])
    paths = [str(root / f"s-{number:06d}.tar") for number in range(4)]
    assert main(["data", "index", *paths, "--workers", "2"]) == 2
    message = capsys.readouterr().err
    assert "2 shard(s) cannot be indexed" in message
    assert "s-000000.tar is torn" in message and f"missing shard={paths[3]}" in message
    assert len(list(root.glob("*.index"))) == 2


@pytest.mark.slow
def test_index_dir_of_read_only_shards(root: Path, tokenizer: Tokenizer) -> None:
    before = {path.name for path in root.iterdir()}
    directory = root / "indexes"
    more = overrides(root, tokenizer, f"loader.index_dir={directory}")
    assert main(["data", "index", *more, "--workers", "1"]) == 0
    assert {path.name for path in root.iterdir()} - before == {"indexes"}
    assert len(list(directory.glob("*.index"))) == 3
    recipe = load_recipe(more)
    plan, _ = build_data(recipe.stages["sft"], recipe, str(data_recipes_dir()))
    assert len(plan.step(0, 1).packs[0][0].samples) > 0
