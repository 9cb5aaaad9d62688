"""What is found in foreign weights or a tokenizer: one sentence, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from nvlm_train.errors import CheckpointError

Level = Literal["error", "warning"]


@dataclass(frozen=True)
class Problem:
    """One finding. Training refuses errors and logs warnings; `nvlm doctor` shows both."""

    level: Level
    text: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.text}; {self.remedy}"


Problems = Iterator[Problem]


def error(text: str, remedy: str) -> Problem:
    """What would be computed wrong, or not at all."""
    return Problem("error", text, remedy)


def warning(text: str, remedy: str) -> Problem:
    """What is computed as the recipe says, but perhaps not as it is meant."""
    return Problem("warning", text, remedy)


def refuse(problems: Iterable[Problem]) -> None:
    """Raises what a reader of weights must not pass over.

    Raises:
        CheckpointError: with every error among `problems`, not only the first.
    """
    errors = [str(each) for each in problems if each.level == "error"]
    if errors:
        raise CheckpointError("\n  - ".join(errors))
