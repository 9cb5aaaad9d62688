"""One pass over a WebDataset tar: samples, member by member; what has no place there is refused."""

from __future__ import annotations

import re
import tarfile
from dataclasses import dataclass, field
from typing import IO

from isal.isal_zlib import crc32

from nvlm_train.data.images import read_size
from nvlm_train.data.shards.fields import OWN_FIELDS, FieldMapping
from nvlm_train.data.shards.tar import Shard
from nvlm_train.errors import ShardError

_BLOCK = 512
_REFUSED = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a character device",
    tarfile.BLKTYPE: "a block device",
    tarfile.FIFOTYPE: "a named pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}

_TORN = (tarfile.TarError, EOFError, ValueError, OverflowError, MemoryError)
"""The errors that tarfile raises on damaged headers, extended ones included."""

_META = re.compile(r"(^|/)__[^/]*__($|/)")
"""Names that WebDataset keeps for itself, and what some archivers add."""

Place = tuple[int, int, int]
"""(offset, bytes, CRC-32) of a member's content."""

_NOWHERE: Place = (0, 0, 0)


@dataclass(frozen=True, slots=True)
class TarImage:
    """An image member; `problem` says why its size (then 0 x 0) could not be read."""

    suffix: str
    number: int
    place: Place
    width: int
    height: int
    problem: str = ""


@dataclass(slots=True)
class TarSample:
    """Members that share a key."""

    key: str
    records: list[Place]
    """One for each member that the field mapping names, 0 bytes when missing."""
    images: list[TarImage] = field(default_factory=list)


def scan_tar(shard: Shard, fields: FieldMapping = OWN_FIELDS) -> list[TarSample]:
    """Returns samples in the order of their first members, images by number (`KEY.jpg` is 0).

    The members of a sample need not stand together (`tar` packs a folder in any order). What
    WebDataset passes over is passed over: names without a suffix, hidden files, `__meta__`.

    Raises:
        ShardError: torn tar, a member that is no plain file or leaves the tar, a repeated member.
    """
    samples: dict[str, TarSample] = {}
    current, last_good = "none", "none"
    try:
        with shard.open() as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            end, total = 0, shard.stamp().size
            for member in tar:
                end = member.offset_data + _padded(member.size)
                if not 0 <= end <= total:
                    raise EOFError(f"member={member.name!r} ends at byte {end} of {total}")
                key, suffix = split_name(member.name)
                if _check_member(shard.path, member) or not key or not suffix:
                    continue
                if key != current:
                    current, last_good = key, current
                sample = samples.setdefault(key, TarSample(key, [_NOWHERE] * len(fields.members)))
                _add_member(shard.path, sample, member, stream, fields)
            _check_end(stream, end)
    except _TORN as error:
        raise ShardError(
            f"shard={shard.path} is torn or no plain tar: {error}; last good key={last_good}; "
            "write it again, or copy it again from its source"
        ) from error
    for sample in samples.values():
        sample.images.sort(key=lambda image: (image.number, image.suffix))
    return list(samples.values())


def split_name(name: str) -> tuple[str, str]:
    """Returns (key, suffix): WebDataset splits a file name at its first dot.

    A name that belongs to no sample gives ("", "").

    >>> split_name("./a/b.0.JPG"), split_name("a/._b.jpg")
    (('a/b', '0.jpg'), ('', ''))
    """
    directory, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, suffix = base.partition(".")
    if not stem or _META.search(name):
        return "", ""
    return directory + slash + stem, suffix.lower()


def _padded(size: int) -> int:
    return (size + _BLOCK - 1) // _BLOCK * _BLOCK


def _check_member(path: str, member: tarfile.TarInfo) -> bool:
    """Says whether the member is a directory, which is passed over; refuses what has no place."""
    if not member.name.isprintable():  # undecodable bytes are surrogates here
        raise ShardError(
            f"shard={path}: member={member.name!r} has a name that is no printable text; "
            "write the shard again"
        )
    if member.name.startswith("/") or ".." in member.name.split("/"):
        raise ShardError(
            f"shard={path}: member={member.name!r} points outside the archive; "
            "members are relative names without '..'; write the shard again"
        )
    if member.type in _REFUSED:
        raise ShardError(
            f"shard={path}: member={member.name!r} is {_REFUSED[member.type]}; "
            "only plain files are read; write the shard again"
        )
    return member.isdir()


def _content(stream: IO[bytes], member: tarfile.TarInfo) -> bytes:
    stream.seek(member.offset_data)
    data = stream.read(member.size)
    if len(data) < member.size:
        raise EOFError(f"member={member.name!r} has {len(data)} of its {member.size} bytes")
    return data


def _add_member(
    path: str, sample: TarSample, member: tarfile.TarInfo, stream: IO[bytes], fields: FieldMapping
) -> None:
    suffix = split_name(member.name)[1]
    number = fields.image_number(suffix)
    if suffix not in fields.members and number is None:
        return
    data = _content(stream, member)
    place = (member.offset_data, member.size, crc32(data))
    if suffix in fields.members:
        at = fields.members.index(suffix)
        _check_new(path, member, sample.records[at] == _NOWHERE)
        sample.records[at] = place
    elif number is not None:
        _check_new(path, member, suffix not in [image.suffix for image in sample.images])
        width, height, problem = 0, 0, ""
        try:
            width, height = read_size(data)
        except ValueError as error:
            problem = str(error)
        sample.images.append(TarImage(suffix, number, place, width, height, problem))


def _check_new(path: str, member: tarfile.TarInfo, is_new: bool) -> None:
    if not is_new:
        raise ShardError(
            f"shard={path}: member={member.name!r} occurs twice; keys name samples and suffixes "
            "their members; write the shard again"
        )


def _check_end(stream: IO[bytes], end: int) -> None:
    """Raises EOFError: tarfile took a damaged header, or a cut, for the end of the archive."""
    stream.seek(end)
    block = stream.read(_BLOCK)
    if len(block) < _BLOCK or any(block):
        raise EOFError(f"no end-of-archive mark at byte {end}")
