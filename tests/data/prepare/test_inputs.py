"""Every input format, from files as their makers write them to shards that WebDataset reads."""

from __future__ import annotations

import datetime
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import webdataset

from nvlm_train.data.formats import RAW_FORMATS
from nvlm_train.data.prepare.inputs.entries import Entries, InputSpec, as_sample
from nvlm_train.data.prepare.inputs.formats import FORMATS, open_entries
from nvlm_train.data.prepare.inputs.ocr import grounded
from nvlm_train.data.prepare.preparation import prepare_input
from nvlm_train.data.prepare.staging import Target
from nvlm_train.data.samples.records import read_messages
from nvlm_train.data.shards.fields import FieldMapping
from nvlm_train.data.shards.tar import Sample
from nvlm_train.errors import ShardError
from tests.data.conftest import chat, draw_image, encoded


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """a.png, b.jpg, and c.jpg, which has no suffix."""
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.png").write_bytes(encoded(draw_image(40, 30), "PNG"))
    (folder / "b.jpg").write_bytes(encoded(draw_image(60, 20), "JPEG"))
    (folder / "c").write_bytes(encoded(draw_image(20, 60), "JPEG"))
    return folder


def open_(tmp_path: Path, spec: InputSpec) -> Entries:
    return open_entries(spec, tmp_path / "spool")


def samples(tmp_path: Path, spec: InputSpec) -> list[Sample]:
    entries = open_(tmp_path, spec)
    return [as_sample(f"{n:09d}", entries.read(n)) for n in range(len(entries))]


def answers(sample: Sample) -> list[str]:
    key, record, images = sample
    messages = read_messages(json.dumps(record).encode(), key, len(images), "sft")
    return [message.text for message in messages if message.role == "assistant"]


def write(path: Path, content: object) -> str:
    path.write_text(json.dumps(content))
    return str(path)


LLAVA = [
    {"id": "x.1", "image": "a.png", **chat("<image>\nq", "a")},
    {"id": "x.1", "images": ["a.png", "c"], **chat("<image><image>\nq", "a")},
    chat("q", "a"),
]


def test_the_command_line_names_every_format() -> None:
    assert set(RAW_FORMATS) == set(FORMATS)


def test_llava_and_jsonl_make_the_same_samples(tmp_path: Path, photos: Path) -> None:
    path = write(tmp_path / "x.json", LLAVA)
    made = samples(tmp_path / "1", InputSpec("llava", (path,), str(photos)))
    lines = tmp_path / "x.jsonl"
    lines.write_text("\n\n".join(json.dumps(item) for item in LLAVA))
    assert made == samples(tmp_path / "2", InputSpec("jsonl", (str(lines),), str(photos)))
    suffixes = [[suffix for suffix, _ in sample[2]] for sample in made]
    assert suffixes == [["png"], ["0.png", "1.jpg"], []]
    assert made[1][1]["id"] == "x.1" and "images" not in made[1][1]


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_images_in_an_archive(tmp_path: Path, photos: Path, kind: str) -> None:
    archive = str(tmp_path / f"images.{kind}")
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as opened:
            for file in photos.iterdir():
                opened.write(file, file.name)
    else:
        with tarfile.open(archive, "w") as opened:
            opened.add(photos, ".")
    path = write(tmp_path / "x.json", LLAVA)
    folder = samples(tmp_path / "1", InputSpec("llava", (path,), str(photos)))
    assert samples(tmp_path / "2", InputSpec("llava", (path,), archive)) == folder
    entries = open_(
        tmp_path, InputSpec("llava", (write(Path(path), [{"image": "z.jpg"}]),), archive)
    )
    with pytest.raises(ValueError, match=rf"image=z.jpg is not in .*images.{kind}"):
        entries.read(0)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"image": "z.png"}, r"image=.*/photos/z.png does not exist; correct the image folder"),
        ({"image": "../x.json"}, r"image=../x.json lies outside images=.*/photos"),
        ({"image": "/etc/hostname"}, r"image=/etc/hostname lies outside"),
        ({"image": 3}, r"image=3 must be a file name"),
        ({"image": "bad.jpg"}, r"image=bad.jpg: image cannot be read"),
        ({"image": "a.png", "caption": ""}, r"caption='' must be text that is not empty"),
        ({"image": "a.png", **chat("<image><image>", "a")}, r"image marker without image"),
        ({"x": 1, "image": "a.png"}, r"hold none of conversations"),
        (["list"], r"it is a list, not an object"),
        ({"id": "\ud800", **chat("q", "a")}, r"the record is not Unicode text"),
    ],
)
def test_bad_entries(tmp_path: Path, photos: Path, item: object, message: str) -> None:
    (photos / "bad.jpg").write_bytes(b"\xff\xd8\xffno image")
    spec = InputSpec("llava", (write(tmp_path / "x.json", [item]),), str(photos))
    with pytest.raises(ValueError, match=message):
        samples(tmp_path, spec)


def test_whole_inputs_that_are_wrong(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for content, message in (
        ("{}", "must be a JSON list"),
        ("[", "is not JSON"),
        ("[]", "no entries"),
    ):
        path.write_text(content)
        with pytest.raises(ShardError, match=message):
            open_(tmp_path / content, InputSpec("llava", (str(path),)))
    with pytest.raises(ShardError, match="input=nowhere cannot be read"):
        open_(tmp_path, InputSpec("jsonl", ("nowhere",)))
    with pytest.raises(ShardError, match="images=nowhere does not exist"):
        open_(tmp_path, InputSpec("jsonl", (str(path),), "nowhere"))
    with pytest.raises(ShardError, match="takes one input"):
        open_(tmp_path, InputSpec("coco", ("a", "b")))
    with pytest.raises(ShardError, match="has fixed fields"):
        open_(tmp_path, InputSpec("coco", ("a",), fields=FieldMapping((("caption", "x"),))))


def test_jsonl_lines_keep_their_numbers(tmp_path: Path) -> None:
    for name, text in (("x", '{"question": "q", "answer": "a"}\n\n{"broken\n'), ("y", "[]")):
        (tmp_path / f"{name}.jsonl").write_text(text)
    paths = (str(tmp_path / "x.jsonl"), str(tmp_path / "y.jsonl"))
    for _ in range(2):  # found, then read back
        entries = open_(tmp_path, InputSpec("jsonl", paths))
        assert [entries.place(n)[len(str(tmp_path)) + 1 :] for n in range(3)] == [
            "x.jsonl: line 1 (entry 0)", "x.jsonl: line 3 (entry 1)", "y.jsonl: line 1 (entry 2)"
        ]  # fmt: skip
    with pytest.raises(ValueError, match="it is not JSON"):
        entries.read(1)


def test_json_fields_by_other_names(tmp_path: Path, photos: Path) -> None:
    item = {"id": 4, "pic": "a.png", "qa": {"q": "what?", "a": 2}, "noise": "x"}
    (tmp_path / "x.jsonl").write_text(json.dumps(item))
    fields = FieldMapping((("question", "qa.q"), ("answer", "qa.a")), ("pic",))
    spec = InputSpec("jsonl", (str(tmp_path / "x.jsonl"),), str(photos), fields)
    _, record, images = samples(tmp_path, spec)[0]
    assert record == {"id": 4, "question": "what?", "answer": "2"} and images[0][0] == "png"


def rows(photos: Path) -> list[dict[str, Any]]:
    a, b = (photos / "a.png").read_bytes(), (photos / "b.jpg").read_bytes()
    return [
        {"id": "1", "image": {"bytes": a, "path": None}, **chat("<image>\nq", "a0")},
        {"id": "2", "image": {"bytes": None, "path": "b.jpg"}, **chat("<image>\nq", "a1")},
        {"id": "3", "image": None, **chat("q", "a2")},
        {"id": "4", "image": {"bytes": b, "path": "odd.png"}, **chat("q", "a3")},
    ]


def check_rows(made: list[Sample], photos: Path) -> None:
    a, b = (photos / "a.png").read_bytes(), (photos / "b.jpg").read_bytes()
    assert [sample[2] for sample in made] == [[("png", a)], [("jpg", b)], [], [("jpg", b)]]
    assert [answers(sample) for sample in made] == [["a0"], ["a1"], ["a2"], ["a3"]]
    assert made[0][1] == {"id": "1", **chat("<image>\nq", "a0")}


def test_parquet(tmp_path: Path, photos: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(rows(photos))
    folder = tmp_path / "parquet"
    folder.mkdir()
    pyarrow.parquet.write_table(table.slice(0, 3), folder / "0.parquet", row_group_size=2)
    pyarrow.parquet.write_table(table.slice(3), folder / "1.parquet")
    spec = InputSpec("parquet", (str(folder),), str(photos))
    check_rows(samples(tmp_path, spec), photos)
    assert open_(tmp_path, spec).place(3) == f"{folder}/1.parquet: row 0"
    with pytest.raises(ShardError, match="has no .parquet file"):
        open_(tmp_path, InputSpec("parquet", (str(photos),)))
    with pytest.raises(ShardError, match="is no Parquet file"):
        open_(tmp_path, InputSpec("parquet", (str(photos / "a.png"),)))


def test_parquet_columns_by_other_names(tmp_path: Path, photos: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    data = (photos / "b.jpg").read_bytes()
    day = datetime.date(2024, 1, 1)
    rows_ = [{"TEXT": "a cat", "pixels": [data, data], "other": data, "day": day}]
    path = str(tmp_path / "x.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows_), path)
    fields = FieldMapping((("caption", "TEXT"),), ("pixels",))
    sample = samples(tmp_path, InputSpec("parquet", (path,), fields=fields))[0]
    assert sample[1] == {"caption": "a cat"} and [s for s, _ in sample[2]] == ["0.jpg", "1.jpg"]
    with pytest.raises(ValueError, match=r"date is not JSON .*--field"):
        samples(tmp_path, InputSpec("parquet", (path,)))
    with pytest.raises(
        ValueError, match=r"column TEXT holds NoneType|image=.*a cat does not exist"
    ):
        samples(tmp_path, InputSpec("parquet", (path,), fields=FieldMapping((), ("TEXT",))))


@pytest.mark.slow
def test_datasets_saved_to_disk(tmp_path: Path, photos: Path) -> None:
    import datasets

    found = rows(photos)
    found[1]["image"]["path"] = str(photos / "b.jpg")  # save_to_disk takes the file in
    made = datasets.Dataset.from_list(found)
    made = made.cast_column("image", datasets.Image())
    made = made.select([3, 0, 1, 2]).select([1, 2, 3, 0])
    made.save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict({"train": made}).save_to_disk(tmp_path / "dict")
    spec = InputSpec("datasets", (str(tmp_path / "one"),), str(photos))
    check_rows(samples(tmp_path, spec), photos)
    spec = InputSpec("datasets", (str(tmp_path / "dict"),), str(photos), split="train")
    check_rows(samples(tmp_path, spec), photos)
    for path, split, message in (
        ("dict", "test", r"split='test': .* has \['train'\]"),
        ("one", "train", "is one split"),
        ("photos", "", "was not written by save_to_disk"),
    ):
        with pytest.raises(ShardError, match=message):
            open_(tmp_path, InputSpec("datasets", (str(tmp_path / path),), split=split))


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_members_that_share_a_name(tmp_path: Path, photos: Path, kind: str) -> None:
    pairs = tmp_path / "pairs"
    (pairs / "0001").mkdir(parents=True)
    for number in range(3):
        (pairs / "0001" / f"{number}.jpg").write_bytes((photos / "b.jpg").read_bytes())
        (pairs / "0001" / f"{number}.txt").write_text(f"caption {number}\n")
    (pairs / "0001" / "2.txt").unlink()
    path = pairs if kind == "folder" else tmp_path / f"pairs.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(pairs.rglob("*.*")):
                archive.write(file, file.relative_to(pairs))
    elif kind == "tar":
        with tarfile.open(path, "w") as tar:
            tar.add(pairs, ".")
    fields = FieldMapping((("caption", "txt"),))
    entries = open_(tmp_path, InputSpec("members", (str(path),), fields=fields))
    made = {}
    for number in range(3):
        try:
            made[number] = as_sample("k", entries.read(number))
        except ValueError as error:
            assert "2.txt is missing" in str(error) or "no KEY.txt" in str(error)
    found = [(record, images[0][0]) for _, record, images in made.values()]
    found.sort(key=str)
    assert found == [({"id": f"0001/{n}", "caption": f"caption {n}"}, "jpg") for n in range(2)]


def test_coco_captions(tmp_path: Path, photos: Path) -> None:
    content = {
        "images": [{"id": n, "file_name": name} for n, name in enumerate(("a.png", "b.jpg", "c"))],
        "annotations": [
            {"id": 9, "image_id": 0, "caption": "second"},
            {"id": 8, "image_id": 0, "caption": "first"},
            {"id": 1, "image_id": 2, "caption": "third"},
            {"id": 2, "image_id": 77, "caption": "lost"},
        ],
    }
    spec = InputSpec("coco", (write(tmp_path / "c.json", content),), str(photos))
    entries = open_(tmp_path, spec)
    sample = as_sample("k", entries.read(0))
    assert sample[1] == {"id": 0, "caption": ["first", "second"]}
    drawn = {answers((f"{n}", *sample[1:]))[0] for n in range(20)}
    assert drawn == {"first", "second"} and sample[2][0][0] == "png"
    with pytest.raises(ValueError, match="image id=1 has no caption"):
        entries.read(1)
    with pytest.raises(ValueError, match="captions name image_id=77, which images does not have"):
        entries.read(3)
    write(tmp_path / "c.json", {"annotations": [{"id": 1, "bbox": []}], "images": []})
    with pytest.raises(ShardError, match=r"annotations\[0\] lacks image_id, caption"):
        open_(tmp_path / "2", spec)


def test_vqav2(tmp_path: Path, photos: Path) -> None:
    (photos / "b.jpg").rename(photos / "COCO_val2014_000000000042.jpg")
    texts = ["yes"] * 3 + ["no"] * 6 + ["maybe"]
    questions = [
        {"image_id": 42, "question": "Is it?", "question_id": 42000},
        {"image_id": 42, "question": "Who?", "question_id": 42001},
    ]
    given = [{"answer": text, "answer_id": n} for n, text in enumerate(texts)]
    annotation = {"question_id": 42000, "image_id": 42, "answers": given}
    paths = (
        write(tmp_path / "q.json", {"data_subtype": "val2014", "questions": questions}),
        write(tmp_path / "a.json", {"annotations": [annotation]}),
    )
    entries = open_(tmp_path, InputSpec("vqa", paths, str(photos)))
    _, record, images = as_sample("k", entries.read(0))
    assert record["answers"] == [
        {"answer": "no", "weight": 0.6},
        {"answer": "yes", "weight": 0.3},
        {"answer": "maybe", "weight": 0.1},
    ]
    assert images[0][0] == "jpg" and record["id"] == 42000
    with pytest.raises(ValueError, match="question_id=42001 has no answers"):
        entries.read(1)
    (photos / "COCO_val2014_000000000042.jpg").rename(photos / "42.jpg")
    spec = InputSpec("vqa", paths, str(photos), image_name="{image_id}.jpg")
    assert open_(tmp_path / "2", spec).read(0)[1][0][0] == "42.jpg"
    spec = InputSpec("vqa", paths, str(photos), image_name="{imgid}.jpg")
    with pytest.raises(ShardError, match="image_name={imgid}.jpg does not fit question_id=42000"):
        open_(tmp_path / "3", spec)
    with pytest.raises(ShardError, match="takes two files"):
        open_(tmp_path / "4", InputSpec("vqa", paths[:1], str(photos)))


def test_ocr_boxes(tmp_path: Path, photos: Path) -> None:
    page = {
        "id": 5,
        "image": "a.png",  # 40 x 30
        "regions": [
            {"text": " Total ", "box": [10, 3, 50, 6]},
            {"text": "7 EUR", "quad": [0, 0, 40, 0, 40, 30, 0, 30]},
        ],
    }
    scaled = {**page, "width": 1, "height": 1, "regions": [{"text": "x", "box": [0.5, 0, 1, 0.25]}]}
    path = tmp_path / "pages.jsonl"
    path.write_text("\n".join(json.dumps(item) for item in (page, scaled)))
    made = samples(tmp_path, InputSpec("ocr", (str(path),), str(photos)))
    assert answers(made[0]) == [
        "<ref>Total</ref><box>(250,100),(1000,200)</box>\n"
        "<ref>7 EUR</ref><quad>(0,0),(1000,0),(1000,1000),(0,1000)</quad>"
    ]
    assert answers(made[1]) == ["<ref>x</ref><box>(500,0),(1000,250)</box>"]
    assert made[0][1]["id"] == 5


@pytest.mark.parametrize(
    ("region", "message"),
    [
        ({"text": "x", "box": [50, 3, 60, 6]}, r"lies outside the canvas of 40 x 30"),
        ({"text": "x", "box": [5, 3, 4, 6]}, r"a box is left, top, right, bottom"),
        ({"text": "x", "box": [1, 2, 3]}, r"a box has 4 numbers, a quad 8"),
        ({"text": "x", "box": [1, 2, 3, "4"]}, r"a box has 4 numbers"),
        ({"text": "x"}, r"must have a text and either a box or a quad"),
        ({"text": "", "box": [1, 2, 3, 4]}, r"must have a text"),
        ({"text": "a</ref>", "box": [1, 2, 3, 4]}, r"holds <ref>, <box> or <quad> itself"),
    ],
)
def test_bad_regions(tmp_path: Path, photos: Path, region: dict[str, Any], message: str) -> None:
    path = tmp_path / "pages.jsonl"
    path.write_text(json.dumps({"image": "a.png", "regions": [region]}))
    with pytest.raises(ValueError, match=message):
        samples(tmp_path, InputSpec("ocr", (str(path),), str(photos)))


def test_coordinates_stay_between_0_and_1000() -> None:
    assert grounded("x", [(-5, -5), (999.6, 2000)], 1000, 1000).endswith("(0,0),(1000,1000)</box>")


def test_plain_text(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("one document\n\nanother, ä\n")
    made = samples(tmp_path / "1", InputSpec("text", (str(tmp_path / "x.txt"),)))
    assert [answers(sample) for sample in made] == [["one document"], ["another, ä"]]
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "ä.txt").write_text("of two\nlines")
    (folder / "b.md").write_text("passed over")
    made = samples(tmp_path / "2", InputSpec("text", (str(folder),)))
    assert [answers(sample) for sample in made] == [["of two\nlines"]]
    (folder / "ä.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="can't decode"):
        samples(tmp_path / "3", InputSpec("text", (str(folder),)))


def test_shards_are_read_back_by_webdataset(tmp_path: Path, photos: Path) -> None:
    spec = InputSpec("llava", (write(tmp_path / "x.json", LLAVA),), str(photos))
    manifest = prepare_input(spec, Target(str(tmp_path / "out"), "x", 2))
    urls = str(tmp_path / "out" / manifest.pattern)
    read = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
    assert [sample["__key__"] for sample in read] == [f"{n:09d}" for n in range(3)]
    assert read[0]["png"].size == (40, 30) and read[1]["1.jpg"].size == (20, 60)
    assert read[2]["json"] == LLAVA[2]
