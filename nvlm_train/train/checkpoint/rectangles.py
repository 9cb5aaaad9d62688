"""Cuts a flat range of a matrix into rectangles, which any layout finds again in the whole matrix.

A data-parallel rank owns a range of the numbers of a flattened parameter. Flat ranges mean nothing to
another tensor parallelism: the parameter is cut elsewhere there. Rectangles do: the end of a row, whole
rows, the beginning of a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple


class Rectangle(NamedTuple):
    """A part of a tensor whose numbers follow each other in the flattened one."""

    offset: tuple[int, ...]
    """Of its first number, by axis."""
    size: tuple[int, ...]
    start: int
    """Of its first number, in the flattened tensor."""

    @property
    def stop(self) -> int:
        """Behind its last number, in the flattened tensor."""
        return self.start + math.prod(self.size)


def rectangles(
    shape: tuple[int, ...], start: int, stop: int, most: int = 1 << 24
) -> Iterator[Rectangle]:
    """Cuts a range into at most three rectangles, and whole rows once more where they are many.

    Who wants a part of a rectangle reads all of it from a file: small ones keep what is read in vain small.

    >>> [each.size for each in rectangles((4, 10), 8, 25)]
    [(1, 2), (1, 10), (1, 5)]

    Args:
        shape: of the tensor, which has one axis or two.
        start: the range's first number in the flattened tensor.
        stop: the number behind its last.
        most: numbers of a rectangle, where it has more than one row. The default is 64 MiB of fp32.
    """
    if len(shape) == 1:
        for first in range(start, stop, most):
            yield Rectangle((first,), (min(first + most, stop) - first,), first)
        return
    _, width = shape
    rows_at_once = max(most // width, 1)
    while start < stop:
        row, column = divmod(start, width)
        rows = min((stop - start) // width, rows_at_once) if column == 0 else 0
        size = (rows, width) if rows else (1, min(width - column, stop - start))
        found = Rectangle((row, column), size, start)
        yield found
        start = found.stop
