"""A recipe of real size on directories of weights: config.json wins over the sizes of the group's files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nvlm_train.recipe.load import load_recipe
from tests.recipes import twin_runs
from tests.recipes.directories import write_encoder, write_qwen
from tests.recipes.shipped import load
from tests.recipes.twin import twin_of, write_tokenizer
from tests.train.smoke import make_smoke_data, read_metrics
from tests.workers import WorkerPool

STEPS = 5


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("from")
    make_smoke_data(root)
    write_tokenizer(root)
    return root


@pytest.fixture(scope="module")
def overrides(data: Path) -> list[str]:
    """Directories of the sizes of nvlm_d_2b's twin, named as its command names them; a short run."""
    twin = twin_of(load("nvlm_d_2b"), data, data).model
    language = write_qwen(data / "language", twin.language, data / "twins.json")
    vision = write_encoder(data / "vision", twin.vision)
    short = {
        "blend": data / "blend.yaml", "steps": STEPS, "batch.size": 6, "optimizer.warmup_steps": 1,
        "hidden_dropout": 0.0, "attention_dropout": 0.0,
    }  # fmt: skip
    return [
        "experiment=nvlm_d_2b",
        f"model.language.from={language}",
        f"model.vision.from={vision}",
        "precision=fp32",
        "loader.max_skipped_fraction=0.1",
        *(f"stages.{stage}.{key}={short[key]}" for stage in ("pretrain", "sft") for key in short),
    ]


def test_sizes_are_those_of_the_directories(data: Path, overrides: list[str]) -> None:
    twin, model = twin_of(load("nvlm_d_2b"), data, data).model, load_recipe(overrides).model
    assert model.language == replace(twin.language, weights=str(data / "language"))
    assert model.vision == replace(
        twin.vision,
        weights=str(data / "vision"),
        batch_tiles=load("nvlm_d_2b").model.vision.batch_tiles,
    )
    assert model.tokenizer == replace(twin.tokenizer, path=str(data / "language"))
    # It is as wide as the feed-forward of whatever language model there is.
    assert model.projector.ffn_hidden_size == twin.language.ffn_hidden_size


def test_what_config_json_does_not_say_stays(overrides: list[str]) -> None:
    """Chats of Yi's form, cross-attention, and what the command line states beside `from`."""
    other = [each for each in overrides if not each.startswith("experiment=")]
    model = load_recipe(
        [
            "experiment=nvlm_x_34b",
            *other,
            "model.cross_attention.every=2",
            "model.language.norm_eps=1e-3",
        ]
        + [f"parallel@stages.{stage}.parallel=single" for stage in ("pretrain", "sft")]
    ).model
    assert model.tokenizer.template == "yi" and model.architecture == "x"
    assert model.language.norm_eps == 1e-3 and model.language.qkv_bias
    assert model.projector.ffn_hidden_size is None


@pytest.fixture(scope="module")
def eight() -> Iterator[WorkerPool]:
    pool = WorkerPool(8)
    yield pool
    pool.close()


@pytest.mark.slow
def test_a_run_on_tied_directories_is_that_of_one_process(
    eight: WorkerPool, overrides: list[str], tmp_path: Path
) -> None:
    """TP2 x PP2 x DP2, where both ends of the pipeline hold the table, against one rank."""
    losses, tables = [], []
    for world, layout in ((8, "tp2_pp2"), (1, "single")):
        run_dir = tmp_path / layout
        places = [f"parallel@stages.{stage}.parallel={layout}" for stage in ("pretrain", "sft")]
        recipe = load_recipe([*overrides, *places, f"run_dir={run_dir}"])
        assert recipe.model.language.tied_embeddings
        tables.append(eight.run(world, twin_runs.run_and_show_tables, recipe, timeout=550))
        losses.append([record["loss"] for record in read_metrics(run_dir)])
    split, alone = losses
    assert len(alone) == 2 * STEPS and len(set(alone)) == 2 * STEPS
    assert split == pytest.approx(alone, rel=1e-5)

    # Ranks are in the order tensor, data, pipeline: 0 to 3 hold the first stage, 4 to 7 the last.
    assert all(len(copies) == 2 for copies in tables[0])
    for stage in range(2):
        copies = [of_rank[stage] for of_rank in tables[0]]
        for rank in range(4):
            assert torch.equal(copies[rank], copies[rank + 4]) and torch.equal(
                copies[rank], copies[rank ^ 2]
            )
        whole, (alone_table,) = torch.cat(copies[:2]), [each[stage] for each in tables[1]]
        torch.testing.assert_close(whole, alone_table, rtol=0, atol=2e-5)
    frozen, trained = tables[1][0]
    assert not torch.equal(frozen, trained), "SFT trains the language model"
