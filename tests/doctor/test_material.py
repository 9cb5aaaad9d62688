"""Tokenizer, shards, indexes and labels: each check on data that is right and on data that is broken."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from nvlm_train.config.schema import Recipe
from nvlm_train.data.prepare.write import prepare_shards
from nvlm_train.doctor.finding import Finding
from nvlm_train.doctor.material import check_labels, check_shards, check_tokenizer

Make = Callable[..., Recipe]


def texts(findings: list[Finding], level: str) -> str:
    return "\n".join(each.text for each in findings if each.level == level)


def rewrite_tokenizer(root: Path, change: Callable[[dict], None]) -> None:
    path = root / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_good_tokenizer(recipe: Make) -> None:
    found = list(check_tokenizer(recipe()))
    assert {each.level for each in found} == {"ok"}
    assert "tile tags (1d)" in texts(found, "ok")


def test_a_vocabulary_that_the_table_does_not_hold(recipe: Make) -> None:
    found = list(check_tokenizer(recipe("model.language.vocab_size=256")))
    assert "model.language.vocab_size=256" in texts(found, "error")


def test_control_tokens_that_do_not_exist_are_all_named(recipe: Make) -> None:
    found = check_tokenizer(recipe("model.tokenizer.pad='<p>'", "model.tokenizer.turn_end='<e>'"))
    assert [each.level for each in found] == ["error", "error"]


def test_a_control_token_that_text_can_forge(recipe: Make, root: Path) -> None:
    def forgeable(content: dict) -> None:
        for token in content["added_tokens"]:
            token["special"] = False

    rewrite_tokenizer(root, forgeable)
    assert "'<|im_end|>' inside a sample becomes" in texts(list(check_tokenizer(recipe())), "error")


def test_a_tag_that_does_not_come_back(recipe: Make, root: Path) -> None:
    rewrite_tokenizer(root, lambda content: content.update(normalizer={"type": "Lowercase"}))
    assert "'<Image>' comes back as '<image>'" in texts(list(check_tokenizer(recipe())), "error")


def lose(text: str) -> Callable[[dict], None]:
    """Returns a change of tokenizer.json after which it cannot give `text` back."""
    normalizer = {"type": "Replace", "pattern": {"String": text}, "content": "?"}
    return lambda content: content.update(normalizer=normalizer)


@pytest.mark.parametrize(
    ("tiling", "tag", "is_used"),
    [
        ("{thumbnail: true, max_tiles: 6, tags: 1d}", "<tile_global_thumbnail>", True),
        ("{thumbnail: false, max_tiles: 6, tags: 1d}", "<tile_global_thumbnail>", False),
        ("{thumbnail: false, max_tiles: 6, tags: 1d}", "<tile_6>", True),
        ("{thumbnail: false, max_tiles: 1, tags: 1d}", "<tile_1>", True),
        ("{thumbnail: true, max_tiles: 1, tags: 1d}", "<tile_1>", False),
        ("{thumbnail: true, max_tiles: 6, tags: 2d_grid}", "<tile_x1_y2>", True),
        ("{thumbnail: true, max_tiles: 6, tags: 2d_bbox}", "(0,333),(500,667)", True),
        ("{thumbnail: true, max_tiles: 6, tags: none}", "<tile_1>", False),
    ],
)
def test_the_tags_that_a_stage_uses_come_back(
    recipe: Make, root: Path, tiling: str, tag: str, is_used: bool
) -> None:
    rewrite_tokenizer(root, lose(tag))
    stage = ["schedule=[sft]", f"stages.sft.tiling={tiling}"]
    found = texts(list(check_tokenizer(recipe(*stage))), "error")
    assert (f"{tag}" in found and "comes back as" in found) == is_used
    assert bool(found) == is_used


def test_indexes_missing_then_fresh_then_stale(recipe: Make, root: Path) -> None:
    made = recipe()
    assert "6 shard(s) without an index" in texts(list(check_shards(made)), "warning")
    assert not list(root.glob("*.index")), "looking at indexes made some"
    list(check_labels(made, None))
    assert {each.level for each in check_shards(made)} == {"ok"}
    os.utime(root / "vqa-000001.tar", ns=(1, 1))
    found = list(check_shards(made))
    assert "0 shard(s) without an index, 1 written since" in texts(found, "warning")


def test_a_missing_shard_is_named_with_the_others_counted(recipe: Make, root: Path) -> None:
    (root / "vqa-000001.tar").unlink()
    found = list(check_shards(recipe()))
    assert "vqa-000001.tar" in texts(found, "error")
    assert "5 shard(s)" in texts(found, "ok")


def test_label_coverage(recipe: Make) -> None:
    found = list(check_labels(recipe(), None))
    assert {each.level for each in found} == {"ok"}
    assert "stage sft: vqa: 24 of 24 samples have trained tokens" in texts(found, "ok")


@pytest.mark.parametrize("tolerance", [0.5, 0.1])
def test_unusable_samples_against_the_tolerance(recipe: Make, root: Path, tolerance: float) -> None:
    unanswered = [{"role": "user", "content": "and then?"}]
    records = [(f"no{number}", {"messages": unanswered}, []) for number in range(12)]
    prepare_shards(records, str(root), "text", samples_per_shard=12)
    # One of two text shards without any label; text is a fifth of the blend: 10% of the draws.
    made = recipe(f"loader.max_skipped_fraction={tolerance - 0.01}")
    found = list(check_labels(made, None))
    assert "text: 12 of 24 samples" in texts(found, "ok")
    bad = texts(found, "error")
    assert ("10.00% of the samples drawn" in bad and "every label is masked" in bad) == (
        tolerance == 0.1
    )


def test_cut_samples_are_a_warning(recipe: Make) -> None:
    (found,) = (
        each
        for each in check_labels(recipe("stages.sft.sequence_length=52"), None)
        if each.level == "warning"
    )
    assert "are cut" in found.text and "stages.sft.sequence_length" in found.remedy
