"""What rules are made of: ranges, and the divisors that a remedy lists."""

from __future__ import annotations

import math
from collections.abc import Iterator

Problems = Iterator[str]
"""What a rule yields: `name=value`, the rule, the remedy."""


def divisors(number: int) -> list[int]:
    """All divisors, ascending.

    >>> divisors(6), divisors(9)
    ([1, 2, 3, 6], [1, 3, 9])
    """
    # Sizes are below 2**31 (shapes.py); of a larger number, which is refused, not all are looked for.
    most = min(math.isqrt(number), 2**16) if number > 0 else 0
    small = [value for value in range(1, most + 1) if number % value == 0]
    return small + [number // value for value in reversed(small) if value * value != number]


def use(values: list[int]) -> str:
    """The remedy that lists them.

    >>> use([1, 2, 4])
    'use 1, 2 or 4'
    """
    words = [str(value) for value in values]
    return "use " + (f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0])


def in_range(name: str, value: float, low: float, high: float = math.inf) -> Problems:
    """A problem when `value` lies outside the range, which is closed at both ends."""
    if not low <= value <= high:
        limits = f"at least {low}" if high == math.inf else f"from {low} to {high}"
        yield f"{name}={value} is out of range; use {limits}"


def below_one(name: str, value: float) -> Problems:
    """A problem when `value` is no rate: 0 or more and less than 1."""
    if not 0.0 <= value < 1.0:
        yield f"{name}={value} is out of range; use 0 or more and less than 1"


def above_zero(path: str, group: object, *keys: str) -> Problems:
    """A problem for each field of a group that is 0 or less."""
    for key in keys:
        value = getattr(group, key)
        if value <= 0:
            yield f"{path}.{key}={value} is out of range; use more than 0"
