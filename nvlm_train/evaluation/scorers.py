"""Scores answers against references, in pure functions on strings."""

from __future__ import annotations

import re
from collections.abc import Sequence


def normalise_answer(text: str) -> str:
    """Returns the text as VQA scores compare it: lower case, single spaces, no full stop at the end."""
    return re.sub(r"\s+", " ", text).strip().rstrip(".").lower()


def exact_match(answers: Sequence[str], references: Sequence[str]) -> float:
    """Returns the share of answers that equal their reference after `normalise_answer`."""
    pairs = list(zip(answers, references, strict=True))
    return sum(normalise_answer(a) == normalise_answer(r) for a, r in pairs) / len(pairs)


def edit_distance(first: str, second: str) -> int:
    """Returns the Levenshtein distance in characters.

    >>> edit_distance("kitten", "sitting")
    3
    """
    previous = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        current = [i]
        for j, b in enumerate(second, 1):
            current.append(min(previous[j] + 1, current[j - 1] + 1, previous[j - 1] + (a != b)))
        previous = current
    return previous[-1]


def character_error_rate(answers: Sequence[str], references: Sequence[str]) -> float:
    """Returns the edits per reference character, over all pairs together.

    A run of white space counts as one space.
    """
    pairs = [
        (" ".join(a.split()), " ".join(r.split())) for a, r in zip(answers, references, strict=True)
    ]
    return sum(edit_distance(a, r) for a, r in pairs) / sum(len(r) for _, r in pairs)
