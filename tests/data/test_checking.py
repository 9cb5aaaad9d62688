"""`nvlm data check`: every kind of finding from real damage, and nothing from sound data."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nvlm_train.cli import main
from nvlm_train.data.checking.duplicates import DuplicateTables, differing_bits
from nvlm_train.data.checking.findings import Findings
from nvlm_train.data.checking.fingerprints import hash_parts, split_words, text_grams
from nvlm_train.data.checking.shard import ImagePrint, ShardPrints
from nvlm_train.data.checking.spill import SpilledTable
from nvlm_train.data.prepare.write import prepare_shards
from nvlm_train.data.shards.tar import Sample
from tests.data.conftest import chat, encoded
from tests.train.smoke import make_smoke_data, overrides

_SENTENCE = "the quick brown fox jumps over a lazy dog while seven owls watch from afar at night"


def photo(seed: int, size: int = 96) -> Image.Image:
    """An image with structure that no other seed has."""
    coarse = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)


def image_sample(key: str, seed: int, question: str = "") -> Sample:
    return (
        key,
        chat(f"<image>{question or key}", f"a{seed}"),
        [("png", encoded(photo(seed), "PNG"))],
    )


def write(root: Path, name: str, *samples: Sample) -> str:
    prepare_shards(samples, str(root), name)
    return str(root / f"{name}-000000.tar")


def check(root: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """(exit code, the findings as JSON)."""
    out = root / "found.json"
    code = main(["data", "check", *arguments, "--json", str(out), "--workers", "1"])
    return code, json.loads(out.read_text()) if out.exists() else {}


def examples(found: dict[str, Any], kind: str) -> list[tuple[str, str]]:
    return [(each["key"], each["reason"]) for each in found["kinds"][kind]["examples"]]


def test_sound_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tars = [write(tmp_path, name, *(image_sample(f"{name}{n}", 10 * i + n) for n in range(4)))
            for i, name in enumerate("ab")]  # fmt: skip
    code, found = check(tmp_path, *tars)
    assert (code, found["kinds"]) == (0, {})
    assert (found["num_shards"], found["num_samples"], found["num_images"]) == (2, 8, 8)
    assert "nothing found" in capsys.readouterr().out


def test_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write(tmp_path, "good", image_sample("g", 1))
    torn = Path(write(tmp_path, "torn", image_sample("t", 2), image_sample("u", 3)))
    torn.write_bytes(torn.read_bytes()[:-12_000])
    link = tmp_path / "link.tar"
    with tarfile.open(link, "w") as tar:
        member = tarfile.TarInfo("a.json")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)
    whole = encoded(photo(4), "JPEG")
    bad = write(
        tmp_path, "bad",
        ("cut", chat("<image>?", "a"), [("jpg", whole[:-60])]),
        ("noise", chat("<image>?", "b"), [("jpg", b"not an image")]),
        ("marker", chat("<image><image>?", "c"), [("png", encoded(photo(5), "PNG"))]),
        ("mute", {"messages": [{"role": "user", "content": "hi"}]}, []),
        ("odd", {"nothing": 1}, [("png", encoded(photo(6), "PNG"))]),
        ("fine", chat("hello", "you"), []),
    )  # fmt: skip
    code, found = check(tmp_path, good, str(torn), str(link), bad, str(tmp_path / "gone.tar"))
    assert code == 1
    kinds = {name: kind["count"] for name, kind in found["kinds"].items()}
    assert kinds == {
        "torn or refused shard": 2,
        "missing shard": 1,
        "image cannot be read": 2,
        "image marker without image": 1,
        "every label is masked": 1,
        "record cannot be read": 1,
    }
    shards = [each["shard"] for each in found["kinds"]["torn or refused shard"]["examples"]]
    assert shards == [str(torn), str(link)]
    assert [key for key, _ in examples(found, "image cannot be read")] == ["cut", "noise"]
    assert examples(found, "every label is masked")[0][0] == "mute"
    assert found["num_samples"] == 7
    shown = capsys.readouterr().out
    assert "image marker without image" in shown and "gone.tar" in shown


def test_duplicates_across_shards(tmp_path: Path) -> None:
    first = write(
        tmp_path, "a", image_sample("one", 1, "What is it?"), image_sample("two", 2),
        ("chat", chat("Say  hello, please!", "Hello."), []),
    )  # fmt: skip
    same = ("again", *image_sample("one", 1, "What is it?")[1:])
    second = write(
        tmp_path, "b", same, image_sample("other_question", 1, "Which colours?"),
        ("shout", chat("say hello PLEASE", "hello"), []),
    )  # fmt: skip
    code, found = check(tmp_path, first, second)
    assert code == 1 and set(found["kinds"]) == {"duplicate sample", "near-duplicate sample"}
    assert examples(found, "duplicate sample") == [("again", f"equals one in {first}")]
    assert examples(found, "near-duplicate sample") == [
        ("shout", f"has the words of chat in {first}")
    ]
    # The same image under another question is how VQA sets are made: counted, not found.
    assert found["shared_images"] == 2
    ignoring = ["--ignore", "duplicate sample", "--ignore", "near-duplicate sample"]
    assert check(tmp_path, first, second, *ignoring)[0] == 0


def test_near_duplicate_images(tmp_path: Path) -> None:
    resized = encoded(photo(7).resize((60, 60)), "JPEG", quality=70)
    tar = write(
        tmp_path, "a", image_sample("whole", 7), image_sample("else", 8),
        ("small", chat("<image>what?", "x"), [("jpg", resized)]),
    )  # fmt: skip
    code, found = check(tmp_path, tar, "--image-distance", "7")
    assert code == 1 and set(found["kinds"]) == {"near-duplicate image"}
    ((key, reason),) = examples(found, "near-duplicate image")
    assert key == "small" and reason.startswith(f"looks like whole in {tar}")


@pytest.mark.parametrize("form", ["jsonl", "tar"])
def test_evaluation_material(tmp_path: Path, form: str) -> None:
    (tmp_path / "eval").mkdir()
    held_out = [
        ("e0", chat("<image>Is this a crop?", "yes"), photo(20)),
        ("e1", chat("<image>And this?", "no"), photo(21)),
        ("e2", chat(f"Read: {_SENTENCE}", "done"), None),
    ]  # fmt: skip
    lines, samples = [], []
    for key, record, image in held_out:
        data = encoded(image, "PNG") if image else b""
        if image:
            (tmp_path / "eval" / f"{key}.png").write_bytes(data)
        lines.append(json.dumps(record | ({"image": f"{key}.png"} if image else {})))
        samples.append((key, record, [("png", data)] if image else []))
    (tmp_path / "eval/set.jsonl").write_text("\n".join(lines))
    against = (
        f"{tmp_path}/eval/set.jsonl"
        if form == "jsonl"
        else write(tmp_path / "eval", "set", *samples)
    )
    bigger = encoded(photo(21, 97), "JPEG", quality=90)
    tar = write(
        tmp_path, "train", image_sample("same", 20, "Other words."),
        ("similar", chat("<image>Describe.", "x"), [("jpg", bigger)]),
        ("text", chat("Continue", f"... {_SENTENCE.upper()}, and so on"), []),
        ("short", chat("the quick brown fox jumps", "over"), []),
        image_sample("free", 22),
    )  # fmt: skip
    code, found = check(tmp_path, tar, "--against", against, "--image-distance", "7")
    assert code == 1
    assert {name: kind["count"] for name, kind in found["kinds"].items()} == {
        "image of evaluation": 1,
        "near-duplicate image of evaluation": 1,
        "text of evaluation": 1,
    }
    owner = (lambda n: f"also in line {n + 1} of {against}") if form == "jsonl" else (
        lambda n: f"also in e{n} in {against}")  # fmt: skip
    assert examples(found, "image of evaluation") == [("same", owner(0))]
    assert examples(found, "near-duplicate image of evaluation") == [("similar", owner(1))]
    assert examples(found, "text of evaluation") == [("text", owner(2))]


def test_instructions_that_many_share_are_no_leak(tmp_path: Path) -> None:
    (tmp_path / "e.jsonl").write_text(json.dumps(chat(f"{_SENTENCE} unlike", "a")))
    samples = [(f"k{n}", chat(f"{n} {_SENTENCE}", f"{n}"), []) for n in range(11)]
    few, many = write(tmp_path, "few", *samples[:10]), write(tmp_path, "many", *samples)
    against = ["--against", f"{tmp_path}/e.jsonl"]
    assert check(tmp_path, few, *against)[1]["kinds"]["text of evaluation"]["count"] == 10
    assert check(tmp_path, many, *against)[0] == 0


def test_a_recipe_is_checked_with_its_own_encoding(tmp_path: Path) -> None:
    """The answer lies behind the sequence length: only the stage's encoder can know."""
    make_smoke_data(tmp_path, samples=4)
    prepare_shards([("long", chat("word " * 400, "a"), [])], str(tmp_path), "long")
    blend = {"sources": [
        {"name": "long", "shards": "long.manifest.json"},
        {"name": "lost", "shards": "lost.tar", "layout": "jsonl", "licence": "on its page"},
    ]}  # fmt: skip
    (tmp_path / "b.yaml").write_text(json.dumps(blend))
    own = (f"stages.sft.blend={tmp_path}/b.yaml", f"loader.data_root={tmp_path}")
    code, found = check(tmp_path, *overrides(tmp_path, tmp_path, *own), "--stage", "sft")
    assert code == 1 and set(found["kinds"]) == {"every label is masked", "missing shard"}
    ((_, reason),) = examples(found, "missing shard")
    assert "nvlm data prepare jsonl" in reason and "licence: on its page" in reason
    by_name = check(tmp_path, f"{tmp_path}/long-000000.tar")
    assert by_name[0] == 0


@pytest.mark.slow
def test_several_processes_find_the_same(tmp_path: Path) -> None:
    make_smoke_data(tmp_path)
    code, one = check(tmp_path, *overrides(tmp_path, tmp_path), "--stage", "sft")
    out = tmp_path / "two.json"
    command = ["data", "check", *overrides(tmp_path, tmp_path), "--stage", "sft"]
    assert main([*command, "--workers", "2", "--json", str(out)]) == code
    assert json.loads(out.read_text()) == one


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "arguments=[]: give a recipe's overrides, or names of shards"),
        (["a.tar", "experiment=smoke"], "give a recipe's overrides, or names of shards"),
        (["a.tar", "--image-distance", "8"], "--image-distance=8 must be 0 to 7"),
        (["a{.tar"], "balance the braces"),
        (
            ["experiment=smoke", "stages.sft.blend=nvlm_sft_text"],
            "missing shard=./sharegpt.manifest",
        ),
        (
            ["experiment=smoke", "model.tokenizer.path=no", "--workers", "4"],
            "model.tokenizer.path=no",
        ),
        (["a.tar", "--against", "no.jsonl"], "evaluation=no.jsonl cannot be read"),
        (["a.tar", "--against", "no.tar"], "evaluation shard=no.tar: missing shard"),
    ],
)
def test_wrong_arguments(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["data", "check", *arguments]) == 2
    assert message in capsys.readouterr().err


_HASHES = st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=12)


@settings(max_examples=25, deadline=None)
@given(_HASHES, st.lists(st.tuples(st.integers(0, 11), st.sets(st.integers(0, 63), max_size=9)), max_size=8),
       st.integers(0, 7))  # fmt: skip
def test_near_images_are_all_found(
    tmp_path_factory: pytest.TempPathFactory, hashes: list[int],
    changes: list[tuple[int, set[int]]], distance: int,
) -> None:  # fmt: skip
    """The parts of the hashes lead to the same images as comparing all pairs."""
    for index, bits in changes:
        hashes = [*hashes, hashes[index % len(hashes)] ^ sum(1 << bit for bit in bits)]
    prints = ShardPrints(images=[ImagePrint(n + 1, each, n) for n, each in enumerate(hashes)])
    tables = DuplicateTables(tmp_path_factory.mktemp("near"), distance)
    tables.add(prints, 0)
    found = Findings()
    tables.report(found, lambda place: ("s", str(place)))
    wanted = sum(
        any((hashes[n] ^ hashes[m]).bit_count() <= distance for m in range(n))
        for n in range(len(hashes))
    )
    kind = found.kinds.get("near-duplicate image")
    assert (kind.count if kind else 0) == wanted


@pytest.mark.parametrize("distance", range(8))
def test_changes_spread_over_the_hash_are_found(tmp_path: Path, distance: int) -> None:
    """The worst case: every part of the hash but one has changed."""
    parts = distance + 1
    images: list[ImagePrint] = []
    for n in range(parts):
        kept = [64 * part // parts for part in range(parts) if part != n]
        base = hash_parts(b"base", bytes([n]))
        near = base ^ sum(1 << b for b in kept)
        images += [ImagePrint(2 * n, base, 2 * n), ImagePrint(2 * n + 1, near, 2 * n + 1)]
    tables, found = DuplicateTables(tmp_path, distance), Findings()
    tables.add(ShardPrints(images=images), 0)
    tables.report(found, lambda place: ("s", str(place)))
    assert found.kinds["near-duplicate image"].count == parts


def test_differing_bits() -> None:
    a = np.array([0, 2**64 - 1, 5], dtype=np.uint64)
    assert differing_bits(a[:, None], a[None, :]).tolist() == [[0, 64, 2], [64, 0, 62], [2, 62, 0]]


def test_spilled_rows_come_back_by_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nvlm_train.data.checking.spill._ROWS_IN_MEMORY", 100)
    table = SpilledTable(tmp_path, "t")
    keys = np.random.default_rng(0).integers(0, 300, 2000).astype(np.uint64)
    for start in range(0, 2000, 50):
        part = keys[start : start + 50]
        table.add(part, np.arange(start, start + 50), value=part + np.uint64(1))
    groups = {int(group["key"][0]): group for group in table.groups()}
    for key, count in zip(*np.unique(keys, return_counts=True), strict=True):
        if count > 1:
            assert groups[int(key)]["place"].tolist() == np.flatnonzero(keys == key).tolist()
            assert set(groups[int(key)]["value"].tolist()) == {int(key) + 1}
    assert len(groups) == int((np.unique(keys, return_counts=True)[1] > 1).sum())


def test_words_and_their_runs() -> None:
    words = split_words(_SENTENCE)
    assert len(words) == 17 and len(text_grams([_SENTENCE])) == 5
    assert split_words("Ünïcode, 日本 x2") == ["ünïcode", "日", "本", "x2"]
    part = text_grams([" ".join(words[2:15])])
    assert len(part) == 1 and part[0] in text_grams([_SENTENCE.upper() + "!"])
    assert len(text_grams(["seven words are too few to tell"])) == 0
    # A short text counts as a whole only, not as a part of a longer one.
    short = text_grams([" ".join(words[:9])])
    assert len(short) == 1 and short[0] not in text_grams([_SENTENCE])
    assert hash_parts(b"a", b"bc") != hash_parts(b"ab", b"c")


def test_images_of_other_kinds(tmp_path: Path) -> None:
    """Grey, transparent and palette images have looks, too."""
    samples = []
    for n, mode in enumerate(("L", "RGBA", "P")):
        stream = io.BytesIO()
        photo(30 + n).convert(mode).save(stream, "PNG")
        samples.append((f"k{n}", chat(f"<image>{mode}", "a"), [("png", stream.getvalue())]))
    assert check(tmp_path, write(tmp_path, "modes", *samples))[0] == 0
