"""Tars that others' tools made, read where they are: by WebDataset, by tar, in img2dataset's layout."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset

from nvlm_train.data.index.reader import ShardReader
from nvlm_train.data.index.shard_index import load_index
from nvlm_train.data.plan.data_recipe import Blend, SourceConfig, read_blend
from nvlm_train.data.plan.sources import open_sources
from nvlm_train.data.samples.encoder import SampleEncoder
from nvlm_train.data.samples.records import read_messages
from nvlm_train.data.shards.fields import OWN_FIELDS, FieldMapping, read_fields
from nvlm_train.data.shards.store import Store
from nvlm_train.data.shards.tar import LocalShard, write_shards
from nvlm_train.errors import ConfigError, ShardError
from tests.data.conftest import chat, draw_image, encoded, mixed_samples

CAPTION = FieldMapping((("caption", "txt"),))


def jpeg(seed: int = 0) -> bytes:
    return encoded(draw_image(40, 30, seed), "JPEG")


def open_tar(path: Path, fields: FieldMapping = OWN_FIELDS) -> ShardReader:
    shard = LocalShard(str(path))
    return ShardReader(path.name, shard, load_index(shard, fields=fields), fields)


def img2dataset_tar(path: Path) -> None:
    """As img2dataset's WebDatasetSampleWriter writes: jpg, txt, and json with these fields."""
    with webdataset.TarWriter(str(path)) as tar:
        for number in range(3):
            key = f"{number:09d}"
            fields = {
                "caption": f"caption {number}",
                "url": "http://127.0.0.1/x.jpg",
                "key": key,
                "status": "success",
                "error_message": None,
                "width": 40,
                "height": 30,
                "original_width": 400,
                "original_height": 300,
                "exif": "{}",
                "sha256": "0" * 64,
            }
            sample = {"__key__": key, "jpg": jpeg(number), "txt": f"text {number}"}
            tar.write(sample | {"json": json.dumps(fields, indent=4)})


def test_img2dataset_tars_need_no_mapping(tmp_path: Path) -> None:
    img2dataset_tar(tmp_path / "00000.tar")
    reader = open_tar(tmp_path / "00000.tar")
    assert reader.index.keys.tolist() == [f"{n:09d}" for n in range(3)]
    assert reader.index.image_sizes(1) == [(40, 30)] and reader.image(1, 0) == jpeg(1)
    assert read_messages(reader.record(2), "k", 1, "sft")[1].text == "caption 2"
    mapped = open_tar(tmp_path / "00000.tar", CAPTION)
    assert read_messages(mapped.record(2), "k", 1, "sft")[1].text == "text 2"


@pytest.mark.parametrize("image", ["jpg", "jpeg", "JPG", "png", "webp"])
def test_suffixes_of_images(tmp_path: Path, image: str) -> None:
    with webdataset.TarWriter(str(tmp_path / "a.tar"), encoder=False) as tar:
        tar.write({"__key__": "x/1", image: jpeg(), "caption": b" a cat\n"})
    reader = open_tar(tmp_path / "a.tar", FieldMapping((("caption", "caption"),)))
    assert json.loads(reader.record(0)) == {"caption": "a cat"} and reader.key(0) == "x/1"
    assert reader.index.image_sizes(0) == [(40, 30)]


def test_class_labels_with_a_question_for_all(tmp_path: Path) -> None:
    pattern = str(tmp_path / "digits-%06d.tar")
    with webdataset.ShardWriter(pattern, maxcount=2, verbose=0) as shards:
        for number in range(3):
            shards.write({"__key__": f"{number}", "png": draw_image(9, 9), "cls": number + 5})
    mapping = FieldMapping((("question", "=Which digit is this?"), ("answer", "cls")))
    reader = open_tar(tmp_path / "digits-000000.tar", mapping)
    assert json.loads(reader.record(1)) == {"question": "Which digit is this?", "answer": "6"}


def test_numbers_become_text_except_the_number_of_a_choice() -> None:
    values = {"json": {"q": 3, "a": 2, "c": ["x", "y", "z"]}}
    plain = FieldMapping((("question", "json.q"), ("answer", "json.a"), ("task", "=docvqa")))
    assert plain.select(values) == {"question": "3", "answer": "2", "task": "docvqa"}
    chosen = FieldMapping((*plain.sources, ("choices", "json.c")))
    assert chosen.select(values)["answer"] == 2
    problems: list[str] = []
    assert read_fields(dict(chosen.sources), "x", problems) == chosen and not problems


def test_other_json_fields_and_one_of_two_images(tmp_path: Path) -> None:
    dialog = chat("<image>\nq", "a")["conversations"]
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as tar:
        fields = {"meta": {"dialogs": [dialog]}, "short": 7}
        tar.write({"__key__": "k", "jpg": jpeg(), "mask.png": draw_image(8, 8), "json": fields})
        tar.write({"__key__": "l", "jpg": jpeg(), "png": draw_image(8, 8), "json": fields})
    path = tmp_path / "a.tar"
    mapping = FieldMapping((("conversations", "json.meta.dialogs.0"),), ("jpg",))
    reader = open_tar(path, mapping)
    for row in range(2):
        assert json.loads(reader.record(row)) == {"conversations": dialog}
        assert reader.index.image_sizes(row) == [(40, 30)]
    both = open_tar(path, FieldMapping((("caption", "json.short"),), ("mask.png", "png", "jpg")))
    assert both.index.image_sizes(0) == both.index.image_sizes(1) == [(8, 8), (40, 30)]
    assert json.loads(both.record(0)) == {"caption": "7"}


@pytest.mark.parametrize("form", ["gnu", "pax", "ustar"])
def test_tars_made_by_tar(tmp_path: Path, form: str) -> None:
    """With ./ before names, directories, long names, and members in any order."""
    folder = tmp_path / "in" / "deep"
    folder.mkdir(parents=True)
    keys = ["one", "two-" + "x" * (80 if form == "ustar" else 110), "drei ä"]
    for number, key in enumerate(keys):
        (folder / f"{key}.jpg").write_bytes(jpeg(number))
        (folder / f"{key}.txt").write_text(f"text {number}")
    (folder / "._one.jpg").write_bytes(b"what macOS leaves")
    (folder / "README").write_text("no sample")
    names = [f"./deep/{key}.jpg" for key in keys] + [f"./deep/{key}.txt" for key in keys]
    command = [
        "tar",
        f"--format={form}",
        "-cf",
        str(tmp_path / "a.tar"),
        "-C",
        str(tmp_path / "in"),
    ]
    subprocess.run([*command, "./deep/._one.jpg", "./deep/README", *names], check=True)
    reader = open_tar(tmp_path / "a.tar", CAPTION)
    assert reader.index.keys.tolist() == [f"deep/{key}" for key in keys]
    for row in range(3):
        assert json.loads(reader.record(row)) == {"caption": f"text {row}"}
        assert reader.image(row, 0) == jpeg(row)
    subprocess.run([*command[:2], "-cf", str(tmp_path / "b.tar"), *command[4:], "."], check=True)
    whole = open_tar(tmp_path / "b.tar", CAPTION)
    assert sorted(whole.index.keys.tolist()) == sorted(reader.index.keys.tolist())


def test_pax_records_and_global_headers_of_python(tmp_path: Path) -> None:
    with tarfile.open(
        tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "x" * 600}
    ) as tar:
        for name, data in (("ü" * 90 + ".txt", b"caption"), ("ü" * 90 + ".jpg", jpeg())):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1.25
            tar.addfile(info, io.BytesIO(data))
    reader = open_tar(tmp_path / "a.tar", CAPTION)
    assert reader.index.keys.tolist() == ["ü" * 90] and reader.image(0, 0) == jpeg()


def test_mappings_do_not_share_caches(
    tmp_path: Path, make_encoder: Callable[..., SampleEncoder]
) -> None:
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as tar:
        fields = {"long": "a long caption of many words", "short": "a"}
        tar.write({"__key__": "k", "jpg": jpeg(), "json": fields})
    lengths, digests = [], []
    for _ in range(2):
        for name in ("long", "short", "long"):
            mapping = FieldMapping((("caption", f"json.{name}"),))
            blend = Blend("b", (SourceConfig("s", ("a.tar",), fields=mapping),))
            source = open_sources(blend, Store(str(tmp_path)), make_encoder())[0]
            lengths.append(int(source.lengths[0].num_trained[0]))
            digests.append(source.readers[0].index.digest)
    assert lengths[0] > lengths[1] and lengths == [*lengths[:2], lengths[0]] * 2
    assert digests == [*digests[:2], digests[0]] * 2 and digests[0] != digests[1]
    assert len(list(tmp_path.glob("a.tar.index-*"))) == 2
    assert len(list(tmp_path.glob("a.tar.lengths-*"))) == 2
    own = Blend("b", (SourceConfig("s", ("a.tar",)),))
    source = open_sources(own, Store(str(tmp_path)), make_encoder())[0]
    assert source.num_unusable == 1 and "hold none of conversations" in source.lengths[0].reasons[0]


def test_the_empty_mapping_changes_no_digest(tmp_path: Path) -> None:
    write_shards(mixed_samples(4, "k"), str(tmp_path / "s-%06d.tar"))
    first = load_index(LocalShard(str(tmp_path / "s-000000.tar"))).digest
    assert read_fields(None, "", []) == OWN_FIELDS and OWN_FIELDS.digest == ""
    other = load_index(
        LocalShard(str(tmp_path / "s-000000.tar")), fields=FieldMapping((), ("jpg",))
    )
    assert other.digest != first and len(other.images) < 5


def test_what_a_member_lacks_is_said(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "a.tar"), encoder=False) as tar:
        tar.write({"__key__": "a", "jpg": jpeg(), "json": b'{"x": null}'})
        tar.write({"__key__": "b", "jpg": jpeg(), "json": b"{"})
        tar.write({"__key__": "c", "jpg": jpeg()})
    reader = open_tar(tmp_path / "a.tar", FieldMapping((("caption", "json.x"),)))
    with pytest.raises(ValueError, match=r"json.x, which is to be its caption, is missing or null"):
        reader.record(0)
    with pytest.raises(ValueError, match=r"KEY.json is not what its name says"):
        reader.record(1)
    with pytest.raises(ValueError, match=r"record is missing: there is no KEY.json"):
        reader.record(2)
    binary = open_tar(tmp_path / "a.tar", FieldMapping((("caption", "jpg"),), ("png",)))
    with pytest.raises(ValueError, match=r"record cannot be read: KEY.jpg is not what"):
        binary.record(0)


def test_members_of_one_sample_twice(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("./a.txt", "a.txt"):
            tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(ShardError, match=r"member='a.txt' occurs twice"):
        open_tar(tmp_path / "a.tar", CAPTION)


def test_a_data_recipe_names_fields(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text(
        "sources:\n"
        "- {name: a, shards: a.tar, fields: {caption: txt, image: [jpg, mask.png]}}\n"
        "- {name: b, shards: b.tar, fields: {question: '=What?', answer: cls}}\n"
    )
    first, second = read_blend("b", str(tmp_path)).sources
    assert first.fields == FieldMapping((("caption", "txt"),), ("jpg", "mask.png"))
    assert second.fields.members == ("cls",)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("txt", r"sources\[0\].fields='txt' must map fields to places"),
        ("{}", r"fields={} must map fields to places"),
        ("{capton: txt}", r"fields maps capton; a record is one of conversations, messages, "),
        ("{caption: txt, answer: cls}", r"fields maps caption, answer; a record is one of"),
        ("{question: txt}", r"fields maps question; a record is one of"),
        ("{caption: 3}", r"fields.caption=3 must be a place"),
        ("{caption: txt, image: {}}", r"fields.image={} must be a member's suffix"),
    ],
)
def test_wrong_mappings(tmp_path: Path, fields: str, message: str) -> None:
    (tmp_path / "b.yaml").write_text(f"sources:\n- {{name: a, shards: a.tar, fields: {fields}}}\n")
    with pytest.raises(ConfigError, match=message):
        read_blend("b", str(tmp_path))
