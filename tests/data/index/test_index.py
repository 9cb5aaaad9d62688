"""Real tars: what the index says about good ones, and how bad ones are refused."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from nvlm_train.data.index.reader import ShardReader
from nvlm_train.data.index.shard_index import load_index
from nvlm_train.data.shards.store import Store
from nvlm_train.data.shards.tar import LocalShard, expand_pattern, write_shards
from nvlm_train.errors import ShardError
from tests.data.conftest import chat, draw_image, encoded, mixed_samples


@pytest.fixture
def shard(tmp_path: Path) -> LocalShard:
    write_shards(mixed_samples(8, "k"), str(tmp_path / "s-%06d.tar"), 8)
    return LocalShard(str(tmp_path / "s-000000.tar"))


def tar_of(path: Path, *members: tarfile.TarInfo) -> LocalShard:
    """A tar in which every plain member holds its size in zeros."""
    with tarfile.open(path, "w") as tar:
        for member in members:
            tar.addfile(member, io.BytesIO(bytes(member.size)))
    return LocalShard(str(path))


def member(name: str, **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def test_index_and_reader_find_everything(shard: LocalShard) -> None:
    index = load_index(shard)
    reader = ShardReader("s", shard, index)
    samples = mixed_samples(8, "k")
    assert index.keys.tolist() == [key for key, _, _ in samples]
    for row, (_, record, images) in enumerate(samples):
        assert json.loads(reader.record(row)) == record
        assert [reader.image(row, i) for i in range(len(images))] == [data for _, data in images]
    assert index.image_sizes(3) == [(64, 33), (104, 33)] and index.image_sizes(0) == []


def test_webdataset_reads_the_same_shard(shard: LocalShard) -> None:
    read = list(webdataset.WebDataset(shard.path, shardshuffle=False))
    assert [sample["__key__"] for sample in read] == [key for key, _, _ in mixed_samples(8, "k")]
    assert json.loads(read[1]["json"]) == mixed_samples(8, "k")[1][1]


def test_same_samples_make_same_bytes(tmp_path: Path) -> None:
    for name in ("x", "y"):
        write_shards(mixed_samples(6, "k"), str(tmp_path / f"{name}-%06d.tar"), 4)
    for number in range(2):
        paths = [tmp_path / f"{name}-{number:06d}.tar" for name in ("x", "y")]
        assert paths[0].read_bytes() == paths[1].read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_second_look_reads_the_file_beside_the_shard(
    shard: LocalShard, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_index(shard)
    monkeypatch.setattr(LocalShard, "open", None)
    second = load_index(shard)
    assert second.digest == first.digest and np.array_equal(second.images, first.images)


def test_rebuilt_when_the_tar_changed(shard: LocalShard) -> None:
    first = load_index(shard)
    write_shards(mixed_samples(9, "k"), shard.path.replace("000000", "%06d"), 9)
    second = load_index(shard)
    assert (len(first), len(second)) == (8, 9) and first.digest != second.digest


@pytest.mark.parametrize("damage", [b"", b"PK\3\4 but no archive", bytes(300)])
def test_damaged_index_is_made_anew(shard: LocalShard, damage: bytes) -> None:
    digest = load_index(shard).digest
    Path(shard.sibling(".index")).write_bytes(damage)
    assert load_index(shard).digest == digest


def test_nothing_is_unpickled(shard: LocalShard) -> None:
    load_index(shard)
    np.savez(shard.path + ".npz", version=np.array([{"a": 1}], dtype=object), allow_pickle=True)
    os.replace(shard.path + ".npz", shard.sibling(".index"))
    assert len(load_index(shard)) == 8


def test_unwritable_directory_keeps_the_index_in_memory(
    shard: LocalShard, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("read-only file system")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with caplog.at_level(logging.WARNING):
        assert len(load_index(shard)) == len(load_index(shard)) == 8
    assert [r.message for r in caplog.records] == [
        f"cannot write beside the shards in {os.path.dirname(shard.path)} "
        "(read-only file system); indexes stay in memory"
    ]


def test_torn_tar_names_the_last_good_key(shard: LocalShard) -> None:
    data = Path(shard.path).read_bytes()
    index = load_index(shard)
    offset = int(index.records[5, 0])
    Path(shard.path).write_bytes(data[: offset + 5])
    with pytest.raises(ShardError, match=r"s-000000.tar is torn .* last good key=k0004;"):
        load_index(shard)


def test_tar_cut_between_members_is_torn(shard: LocalShard) -> None:
    data = Path(shard.path).read_bytes()
    end = int(load_index(shard).records[5, 0])
    Path(shard.path).write_bytes(data[: end + 512])
    with pytest.raises(ShardError, match=r"is torn .*no end-of-archive mark"):
        load_index(shard)


@pytest.mark.parametrize("cut", range(0, 10240, 487))
def test_every_cut_is_noticed(shard: LocalShard, cut: int) -> None:
    data = Path(shard.path).read_bytes()
    Path(shard.path).write_bytes(data[:cut])
    with pytest.raises(ShardError, match="torn or no plain tar"):
        load_index(shard)


def test_damaged_header_is_not_the_end(shard: LocalShard) -> None:
    data = bytearray(Path(shard.path).read_bytes())
    header = int(load_index(shard).records[5, 0]) - 512
    data[header : header + 10] = b"##########"
    Path(shard.path).write_bytes(data)
    with pytest.raises(ShardError, match=r"torn .*last good key="):
        load_index(shard)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (member("../x.json"), "member='../x.json' points outside the archive"),
        (member("/etc/x.json"), "member='/etc/x.json' points outside the archive"),
        (member("x.jpg", type=tarfile.SYMTYPE, linkname="y"), "'x.jpg' is a symbolic link"),
        (member("x.jpg", type=tarfile.LNKTYPE, linkname="y"), "'x.jpg' is a hard link"),
        (member("x.jpg", type=tarfile.CHRTYPE), "'x.jpg' is a character device"),
        (member("x.jpg", type=tarfile.FIFOTYPE), "'x.jpg' is a named pipe"),
    ],
)
def test_refused_members(tmp_path: Path, bad: tarfile.TarInfo, message: str) -> None:
    with pytest.raises(ShardError, match=message):
        load_index(tar_of(tmp_path / "bad.tar", member("a.json", size=2), bad))


def test_repeated_key(tmp_path: Path) -> None:
    names = ("a.json", "b.json", "a.json")
    with pytest.raises(ShardError, match=r"member='a.json' occurs twice"):
        load_index(tar_of(tmp_path / "bad.tar", *(member(name, size=1) for name in names)))


def test_compressed_and_empty_tars(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "z.tar", "w:gz") as tar:
        tar.addfile(member("a.json"))
    with pytest.raises(ShardError, match="no plain tar"):
        load_index(LocalShard(str(tmp_path / "z.tar")))
    with pytest.raises(ShardError, match="holds no samples"):
        load_index(tar_of(tmp_path / "e.tar"))


def test_bytes_that_changed_under_the_index(shard: LocalShard) -> None:
    index = load_index(shard)
    reader = ShardReader("s", shard, index)
    reader.record(2)
    status = os.stat(shard.path)
    with Path(shard.path).open("r+b") as stream:
        stream.seek(int(index.records[2, 0]) + 3)
        stream.write(b"#")
    os.utime(shard.path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(ShardError, match=r"changed shard=.*s-000000.tar: sample=k0002"):
        reader.record(2)


def test_unreadable_header_is_kept_as_a_reason(tmp_path: Path) -> None:
    bad = [("k", chat("q", "a"), [("jpg", b"not an image")])]
    write_shards(bad, str(tmp_path / "s-%06d.tar"))
    for _ in range(2):  # computed, then read back
        index = load_index(LocalShard(str(tmp_path / "s-000000.tar")))
        with pytest.raises(ValueError, match=r"image cannot be read: not a JPEG.* \(k.jpg\)"):
            index.image_sizes(0)


def test_images_are_ordered_by_number(tmp_path: Path) -> None:
    images = [(f"{n}.png", encoded(draw_image(8 + n, 8), "PNG")) for n in (10, 2, 0)]
    write_shards([("k", chat("q", "a"), images)], str(tmp_path / "s-%06d.tar"))
    index = load_index(LocalShard(str(tmp_path / "s-000000.tar")))
    assert [width for width, _ in index.image_sizes(0)] == [8, 10, 18]


def test_remote_shard(shard: LocalShard, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "memory://bucket/s-000000.tar"
    with fsspec.open(url, "wb") as stream:
        stream.write(Path(shard.path).read_bytes())
    local, remote = load_index(shard), load_index(Store().open(url))
    assert remote.digest == local.digest
    reader = ShardReader("s", Store().open(url), remote)
    assert reader.image(1, 0) == mixed_samples(8, "k")[1][2][0][1]


def test_names() -> None:
    assert expand_pattern("x-{000008..000010}.tar") == [f"x-{n:06d}.tar" for n in (8, 9, 10)]
    assert Store("root").path("a.tar") == "root/a.tar"
    assert Store("s3://bucket/shards/").path("a.tar") == "s3://bucket/shards/a.tar"
    assert Store("root").path("/abs/a.tar") == "/abs/a.tar"


@pytest.mark.parametrize("key", ["a.b", "", "../a", "/a", "a//b"])
def test_keys_that_webdataset_would_misread(tmp_path: Path, key: str) -> None:
    with pytest.raises(ShardError, match="a key is a relative name without dots"):
        write_shards([(key, {}, [])], str(tmp_path / "s-%06d.tar"))
    assert list(tmp_path.iterdir()) == []


def test_writer_refuses_repeated_keys_and_nothing(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="key='a' occurs twice"):
        write_shards([("a", {}, []), ("a", {}, [])], str(tmp_path / "s-%06d.tar"), 1)
    with pytest.raises(ShardError, match="there are no samples to write"):
        write_shards([], str(tmp_path / "s-%06d.tar"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffixes", [["psd"], ["jpg", "jpg"], ["json"], ["a.jpg"]])
def test_writer_refuses_members_that_would_be_lost(tmp_path: Path, suffixes: list[str]) -> None:
    with pytest.raises(ShardError, match="key='k': image suffixes"):
        write_shards([("k", {}, [(s, b"") for s in suffixes])], str(tmp_path / "s-%06d.tar"))
    with pytest.raises(ShardError, match="shards are written locally"):
        write_shards([("k", {}, [])], "s3://bucket/s-%06d.tar")


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=8))
def test_damaged_tars_are_indexed_or_refused(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[float, int]]
) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("a.json", "b" * 120 + ".json", "c.jpg"):
            tar.addfile(member(name, size=3), io.BytesIO(b"abc"))
    data = bytearray(stream.getvalue())
    used = 512 * 9
    for where, value in edits:
        data[int(where * (used - 1))] = value
    path = tmp_path_factory.mktemp("fuzz") / "s.tar"
    path.write_bytes(data)
    with contextlib.suppress(ShardError):
        index = load_index(LocalShard(str(path)))
        reader = ShardReader("s", LocalShard(str(path)), index)
        for row in range(len(index)):
            with contextlib.suppress(ValueError):
                reader.record(row)


def test_claimed_sizes_are_not_believed(tmp_path: Path) -> None:
    shard = tar_of(tmp_path / "s.tar", member("a.json", size=3))
    data = bytearray(Path(shard.path).read_bytes())
    lying = member("a.json", size=2**60)
    data[:512] = lying.tobuf(tarfile.GNU_FORMAT)
    Path(shard.path).write_bytes(data)
    with pytest.raises(ShardError, match="is torn"):
        load_index(shard)
