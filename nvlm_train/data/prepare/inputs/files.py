"""Named files in a folder, a zip or a plain tar; images of listed formats are looked up in them."""

from __future__ import annotations

import os
import tarfile
import zipfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from nvlm_train.errors import ShardError

MAX_FILE_BYTES = 1 << 29
"""More than any image has: a member of an archive that claims more is refused."""


class Files(Protocol):
    """A collection of files with relative names."""

    def names(self) -> Iterator[str]:
        """Yields the names of all files, sorted."""

    def read(self, name: str) -> bytes:
        """Reads a file. Raises ValueError: there is none of this name, or it lies outside."""


class Folder:
    """Files below a directory; links are followed, names that lead out are refused."""

    def __init__(self, root: str) -> None:
        self._root = os.path.abspath(root)

    def names(self) -> Iterator[str]:
        found = [
            os.path.relpath(os.path.join(directory, file), self._root)
            for directory, _, files in os.walk(self._root, followlinks=True)
            for file in files
        ]
        return iter(sorted(found))

    def read(self, name: str) -> bytes:
        path = os.path.normpath(os.path.join(self._root, name))
        if os.path.commonpath([path, self._root]) != self._root:
            raise ValueError(
                f"image={name} lies outside images={self._root}; name a folder that holds them all"
            )
        try:
            return Path(path).read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ValueError(f"image={path} does not exist; correct the image folder") from error


class Zip:
    """Members of a zip archive."""

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            self._archive = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile) as error:
            raise ShardError(
                f"images={path} is no zip that can be read: {error}; copy it again"
            ) from error

    def names(self) -> Iterator[str]:
        infos = self._archive.infolist()
        return iter(sorted(info.filename for info in infos if not info.is_dir()))

    def read(self, name: str) -> bytes:
        try:
            info = self._archive.getinfo(name.removeprefix("./"))
        except KeyError:
            raise ValueError(f"image={name} is not in {self._path}{self._example()}") from None
        if info.file_size > MAX_FILE_BYTES:
            raise ValueError(f"image={name} has {info.file_size} bytes, above {MAX_FILE_BYTES}")
        try:
            return self._archive.read(info)
        except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
            raise ValueError(f"image={name} cannot be unpacked: {error}") from error

    def _example(self) -> str:
        first = next(self.names(), None)
        return f", whose names look like {first!r}" if first else ", which is empty"


class Tar:
    """Plain files of an uncompressed tar."""

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            with tarfile.open(path, "r:") as archive:
                members = [member for member in archive if member.isreg()]
        except (OSError, tarfile.TarError) as error:
            raise ShardError(
                f"images={path} is no plain tar that can be read: {error}; unpack compressed ones"
            ) from error
        self._places = {
            member.name.removeprefix("./"): (member.offset_data, member.size) for member in members
        }

    def names(self) -> Iterator[str]:
        return iter(sorted(self._places))

    def read(self, name: str) -> bytes:
        try:
            offset, size = self._places[name.removeprefix("./")]
        except KeyError:
            raise ValueError(f"image={name} is not in {self._path}") from None
        with Path(self._path).open("rb") as stream:
            stream.seek(offset)
            data = stream.read(size)
        if len(data) < size:
            raise ValueError(f"image={name} is cut short: {self._path} is torn; copy it again")
        return data


def modified(path: str) -> int:
    """Returns when a file was last written, for caches; 0 when it is no local file."""
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0


def open_files(path: str) -> Files:
    """Opens the folder, `.zip` or `.tar` at this path. Raises ShardError: there is none."""
    if os.path.isdir(path):
        return Folder(path)
    if not os.path.exists(path):
        raise ShardError(f"images={path} does not exist; name a folder, a .zip or a .tar")
    return _archive(path, modified(path))


@lru_cache(maxsize=8)
def _archive(path: str, version: int) -> Files:
    del version  # another one is opened again
    return Zip(path) if path.endswith(".zip") else Tar(path)
