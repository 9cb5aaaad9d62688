"""Reads tensors, or slices of them, out of a directory of safetensors files.

safetensors maps a file into memory, and pages that were read would stay resident until it is closed:
as much again as what is kept. So slices are copied in pieces, and the pages of each are let go.
"""

from __future__ import annotations

import ctypes
import logging
import math
import mmap
import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from nvlm_train.convert.headers import Stored
from nvlm_train.errors import CheckpointError

logger = logging.getLogger(__name__)

Index = tuple[slice, ...]
"""A slice with start and stop for each of a tensor's first dimensions; those left out are whole."""
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip
"""Under safetensors' names; others are refused before anything is read (family.py)."""
PIECE = 32 << 20
"""A copy holds this much of a file in memory at a time, or one row of a tensor if that is more. [bytes]"""
EVERY = 10.0
"""Lines about progress are this far apart. [s]"""
_AROUND = 64 << 10
"""Linux maps pages in blocks of this size (fault_around_bytes). [bytes]"""


class WeightFiles:
    """Opens each file when its first tensor is asked for, and keeps it open inside `with`.

    A file is mapped, not read: only what is asked for is fetched.

    Args:
        tensors: what may be read, as `headers.read_headers(...).tensors` has it.
        setting: how the lines about progress name the directory: `model.language.weights=DIRECTORY`.
    """

    def __init__(self, tensors: Mapping[str, Stored], setting: str = "weights") -> None:
        self.tensors = tensors
        """Name to shape, dtype and file."""
        self.setting = setting
        self.bytes_asked = 0
        """Bytes of the slices that were asked for so far, as the files have them."""
        self.bytes_expected = 0
        """Bytes that will be asked for in all, where somebody has counted them."""
        self._began = self._said = time.monotonic()
        self._stack = ExitStack()
        self._open: dict[Path, _Opened] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            took = time.monotonic() - self._began
            logger.info("%s in %.1f s", self._so_far(), took)
        self._open.clear()
        self._stack.close()

    @property
    def bytes_stored(self) -> int:
        """Counts what the tensors that can be read have in the files."""
        return sum(
            self.bytes_of(name) for name, each in self.tensors.items() if each.dtype in DTYPES
        )

    @property
    def files_opened(self) -> int:
        """Counts the files that are open."""
        return len(self._open)

    def read(self, name: str, index: Index = ()) -> Tensor:
        """A slice of a tensor in its file's dtype, in CPU memory of its own.

        Raises:
            CheckpointError: the file cannot be read.
        """
        whole = self._whole(name, index)
        into = torch.empty(
            [each.stop - each.start for each in whole], dtype=DTYPES[self.tensors[name].dtype]
        )
        self.copy_into(into, name, index)
        return into

    def copy_into(self, into: Tensor, name: str, index: Index = ()) -> None:
        """Copies a slice of a tensor into one of its shape, of any dtype and on any device.

        Raises:
            CheckpointError: the file cannot be read.
        """
        whole, opened = self._whole(name, index), self._opened(name)
        assert list(into.shape) == [each.stop - each.start for each in whole], name
        part = opened.slice(self.tensors[name].prefix + name)
        if not whole:
            self._count(part[...])
            into.copy_(part[...])
            return
        first, *others = whole
        for start in range(first.start, first.stop, self._rows(name)):
            stop = min(start + self._rows(name), first.stop)
            piece = part[(slice(start, stop), *others)]
            self._count(piece)
            into[start - first.start : stop - first.start].copy_(piece)
            opened.let_go(piece)

    def bytes_of(self, name: str, index: Index = ()) -> int:
        """The size of a slice in its file."""
        entries = math.prod(each.stop - each.start for each in self._whole(name, index))
        return int(entries) * DTYPES[self.tensors[name].dtype].itemsize

    def _count(self, piece: Tensor) -> None:
        """Counts what is asked for, and says now and then how far reading has come."""
        self.bytes_asked += piece.nbytes
        if time.monotonic() - self._said < EVERY:
            return
        self._said = time.monotonic()
        logger.info("%s", self._so_far())

    def _so_far(self) -> str:
        of = f" of {in_gb(self.bytes_expected)}" if self.bytes_expected else ""
        files = len({stored.path for stored in self.tensors.values()})
        opened = f"{self.files_opened} of {files} files opened"
        return f"{self.setting}: read {in_gb(self.bytes_asked)}{of}, {opened}"

    def _rows(self, name: str) -> int:
        """Counts the rows that lie on at most `PIECE` bytes of the file.

        Whole rows count: between the columns that a slice asks for, the kernel maps the others too.
        """
        stored = self.tensors[name]
        row = math.prod(stored.shape[1:]) * DTYPES[stored.dtype].itemsize
        return max(1, PIECE // max(1, row))

    def _whole(self, name: str, index: Index) -> Index:
        """The index with a start and stop for every dimension."""
        shape = self.tensors[name].shape
        return index + tuple(slice(0, size) for size in shape[len(index) :])

    def _opened(self, name: str) -> _Opened:
        path = self.tensors[name].path
        try:
            if path not in self._open:
                self._open[path] = self._stack.enter_context(_Opened(path))
            return self._open[path]
        except (OSError, _safetensor_error()) as problem:
            raise CheckpointError(
                f"{path}: {name} cannot be read: {problem}; copy the directory again"
            ) from problem


def in_gb(count: int) -> str:
    """Bytes for people.

    >>> in_gb(11_083_000_000), in_gb(1_500_000)
    ('11.08 GB', '0.00 GB')
    """
    return f"{count / 1e9:.2f} GB"


class _Opened:
    """A file, and where it is mapped."""

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        self.path = path
        self._handle: Any = safe_open(path, framework="pt")
        self._range: range | None = None

    def __enter__(self) -> Self:
        self._handle.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.__exit__(*error)

    def slice(self, name: str) -> Any:
        """What `[index]` reads from."""
        return self._handle.get_slice(name)

    def let_go(self, piece: Tensor) -> None:
        """Tells the kernel that the pages under a view are not needed any more.

        They are clean pages of a file: whoever reads them again gets them from the page cache or the
        disk. Other memory would lose its values, so that nothing is done unless the view is mapped.
        """
        if self._range is None:
            self._range = _mapped(self.path.resolve().name, piece.data_ptr())
        steps = zip(piece.shape, piece.stride(), strict=True)
        last = sum((size - 1) * step for size, step in steps) * piece.element_size()
        start, stop = piece.data_ptr(), piece.data_ptr() + last + piece.element_size()
        if not piece.numel() or start not in self._range or stop - 1 not in self._range:
            return
        # The kernel maps a block of pages around each one that is touched.
        start = max(self._range.start, (start - _AROUND) // _AROUND * _AROUND)
        stop = min(self._range.stop, stop + _AROUND)
        if _libc().madvise(start, stop - start, mmap.MADV_DONTNEED):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(self.path))


def _mapped(file_name: str, address: int) -> range:
    """Where in this process's memory the file is mapped that has `address`; empty if none is."""
    maps = Path("/proc/self/maps")
    for line in maps.read_text(encoding="utf-8").splitlines() if maps.exists() else ():
        bounds, *_, last = line.split(maxsplit=5)
        start, stop = (int(bound, 16) for bound in bounds.split("-"))
        if start <= address < stop:
            return range(start, stop) if Path(last).name == file_name else range(0)
    return range(0)


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


def _safetensor_error() -> type[Exception]:
    from safetensors import SafetensorError

    error: type[Exception] = SafetensorError
    return error
