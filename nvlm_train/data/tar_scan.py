"""One pass over a WebDataset tar: samples, member by member; what has no place there is refused."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO

from isal.isal_zlib import crc32

from nvlm_train.data.images import read_size
from nvlm_train.data.shards import IMAGE_SUFFIX, Shard
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
"""What tarfile raises on damaged headers, extended ones included."""

Place = tuple[int, int, int]
"""(offset, bytes, CRC-32) of a member's content."""


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
    record: Place = (0, 0, 0)
    images: list[TarImage] = field(default_factory=list)


def scan_tar(shard: Shard) -> Iterator[TarSample]:
    """Samples in tar order, images by their number (`KEY.jpg` counts as 0).

    Raises:
        ShardError: torn tar, a member that is no plain file or leaves the tar, a repeated key.
    """
    seen: set[str] = set()
    current: TarSample | None = None
    last_good = "none"
    try:
        with shard.open() as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            end, total = 0, shard.stamp().size
            for member in tar:
                end = member.offset_data + _padded(member.size)
                if not 0 <= end <= total:
                    raise EOFError(f"member={member.name!r} ends at byte {end} of {total}")
                if _check_member(shard.path, member):
                    continue
                key, suffix = split_name(member.name)
                if current is None or key != current.key:
                    if current is not None:
                        yield _finished(current)
                        last_good = current.key
                    current = _new_sample(shard.path, key, seen)
                _add_member(current, member, suffix, _content(stream, member))
            _check_end(stream, end)
    except _TORN as error:
        raise ShardError(
            f"shard={shard.path} is torn or no plain tar: {error}; last good key={last_good}; "
            "write it again, or copy it again from its source"
        ) from error
    if current is not None:
        yield _finished(current)


def split_name(name: str) -> tuple[str, str]:
    """(key, suffix): WebDataset splits a file name at its first dot.

    >>> split_name("a/b.0.JPG")
    ('a/b', '0.jpg')
    """
    directory, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return directory + slash + stem, suffix.lower()


def _padded(size: int) -> int:
    return (size + _BLOCK - 1) // _BLOCK * _BLOCK


def _check_member(path: str, member: tarfile.TarInfo) -> bool:
    """True for a directory entry, which is passed over; raises for what has no place in a shard."""
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


def _new_sample(path: str, key: str, seen: set[str]) -> TarSample:
    if key in seen:
        raise ShardError(
            f"shard={path}: key={key!r} occurs twice; keys name samples, and the members of one "
            "sample stand together; write the shard again"
        )
    seen.add(key)
    return TarSample(key)


def _content(stream: IO[bytes], member: tarfile.TarInfo) -> bytes:
    stream.seek(member.offset_data)
    data = stream.read(member.size)
    if len(data) < member.size:
        raise EOFError(f"member={member.name!r} has {len(data)} of its {member.size} bytes")
    return data


def _add_member(sample: TarSample, member: tarfile.TarInfo, suffix: str, data: bytes) -> None:
    place = (member.offset_data, member.size, crc32(data))
    match = IMAGE_SUFFIX.fullmatch(suffix)
    if suffix == "json":
        sample.record = place
    elif match:
        width, height, problem = 0, 0, ""
        try:
            width, height = read_size(data)
        except ValueError as error:
            problem = str(error)
        sample.images.append(TarImage(suffix, int(match[1] or 0), place, width, height, problem))


def _finished(sample: TarSample) -> TarSample:
    sample.images.sort(key=lambda image: (image.number, image.suffix))
    return sample


def _check_end(stream: IO[bytes], end: int) -> None:
    """tarfile takes a damaged header, or a cut between two members, for the end of the archive."""
    stream.seek(end)
    block = stream.read(_BLOCK)
    if len(block) < _BLOCK or any(block):
        raise EOFError(f"no end-of-archive mark at byte {end}")
