"""`nvlm data stats`: its numbers against those counted sample by sample."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from nvlm_train.cli import main
from nvlm_train.config.paths import data_recipes_dir
from nvlm_train.data.dataset import build_data
from nvlm_train.data.plan.statistics import HISTOGRAM_BINS, blend_statistics
from tests.train.smoke import make_smoke_data, overrides, smoke_recipe


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stats")
    make_smoke_data(root)
    return root


def test_numbers_are_those_of_the_samples(root: Path, tmp_path: Path) -> None:
    recipe = smoke_recipe(root, tmp_path)
    stage = recipe.stages["sft"]
    plan, encoder = build_data(stage, recipe, str(data_recipes_dir()))
    found = blend_statistics(plan, 6, 2, stage.steps)
    for source, numbers in zip(plan.sources, found.sources, strict=True):
        samples = [
            encoder.encode(reader.key(row), reader.record(row), reader.index.image_sizes(row))
            for reader in source.readers
            for row in range(len(reader.index))
        ]
        lengths = [len(sample.token_ids) for sample in samples]
        held = numbers.held
        assert (held.samples, held.tokens) == (len(samples), sum(lengths))
        assert held.trained_tokens == sum(len(sample.label_ids) for sample in samples)
        assert held.tiles == sum(sample.num_tiles for sample in samples)
        assert numbers.num_truncated == sum(sample.is_truncated for sample in samples)
        bins = np.minimum(
            np.array(lengths) * HISTOGRAM_BINS // stage.sequence_length, HISTOGRAM_BINS - 1
        )
        assert numbers.lengths == tuple(np.bincount(bins, minlength=HISTOGRAM_BINS).tolist())
    assert [source.share_asked for source in found.sources] == pytest.approx([0.4, 0.4, 0.2])


def test_what_the_steps_draw(root: Path, tmp_path: Path) -> None:
    recipe = smoke_recipe(root, tmp_path)
    stage = recipe.stages["sft"]
    plan, encoder = build_data(stage, recipe, str(data_recipes_dir()))
    found = blend_statistics(plan, 5, 3, stage.steps)
    trained, tokens, packs, worst = [0, 0, 0], 0, 0, 0.0
    for step in range(5):
        ranks = plan.step(step, 3).packs
        loads = [sum(pack.num_tokens for pack in rank) for rank in ranks]
        worst = max(worst, max(loads) / (sum(loads) / 3))
        packs += sum(len(rank) for rank in ranks)
        for ref in (sample for rank in ranks for pack in rank for sample in pack.samples):
            reader = plan.reader(ref)
            sizes = reader.index.image_sizes(ref.row)
            sample = encoder.encode(reader.key(ref.row), reader.record(ref.row), sizes)
            trained[ref.source] += len(sample.label_ids)
            tokens += len(sample.token_ids)
    assert [source.drawn.trained_tokens for source in found.sources] == trained
    assert sum(source.drawn.samples for source in found.sources) == 5 * stage.batch.size
    assert (found.num_packs, found.balance_tokens.worst) == (packs, pytest.approx(worst))
    assert found.packing_efficiency == pytest.approx(tokens / packs / stage.sequence_length)
    vqa = found.sources[1]
    assert vqa.epochs == pytest.approx(vqa.drawn.samples * stage.steps / 5 / vqa.held.samples)


def test_longer_packs_are_counted_as_long_as_they_are(root: Path, tmp_path: Path) -> None:
    recipe = smoke_recipe(root, tmp_path, "stages.sft.pack_length=512", "stages.sft.batch.size=12")
    stage = recipe.stages["sft"]
    plan, _ = build_data(stage, recipe, str(data_recipes_dir()))
    found = blend_statistics(plan, 5, 2, stage.steps)
    steps = [plan.step(step, 2) for step in range(5)]
    assert set(found.pack_lengths) == {step.pack_length for step in steps} <= {*range(128, 513, 64)}
    packs = [(step.pack_length, pack) for step in steps for own in step.packs for pack in own]
    tokens = sum(pack.num_tokens for _, pack in packs)
    assert found.packing_efficiency == pytest.approx(tokens / sum(length for length, _ in packs))
    squares = [
        [sum(s.num_tokens**2 for pack in own for s in pack.samples) for own in step.packs]
        for step in steps
    ]
    worst = max(max(loads) / (sum(loads) / 2) for loads in squares)
    assert found.balance_attention.worst == pytest.approx(worst)
    assert max(source.drawn.samples for source in found.sources) > 0
    # The axis of the histogram is what a sample may have.
    assert sum(found.sources[0].lengths) == found.sources[0].held.samples


def test_command(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "stats.json"
    recipe = overrides(root, tmp_path)
    command = ["data", "stats", *recipe, "--stage", "sft", "--steps", "4", "--dp", "2"]
    assert main([*command, "--json", str(out)]) == 0
    shown, stored = capsys.readouterr().out, json.loads(out.read_text())
    assert [source["name"] for source in stored["sources"]] == ["captions", "vqa", "text"]
    assert all(source["name"] in shown for source in stored["sources"])
    assert f"packing: {stored['packing_efficiency']:.1%} of the token budget used" in shown
    assert "packs of 128 tokens" in shown and "attention" in shown
    assert "busiest over mean" in shown and "█" in shown


def test_wrong_arguments(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["data", "stats", *overrides(root, tmp_path), "--stage", "no"]
    assert main([*command, "--steps", "0", "--dp", "0"]) == 2
    message = capsys.readouterr().err
    assert "3 problem(s)" in message and "--steps=0" in message and "stage=no" in message
