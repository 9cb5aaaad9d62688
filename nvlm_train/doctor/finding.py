"""What a check says: one line, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from nvlm_train.config.schema import Recipe
from nvlm_train.convert.problem import Problem

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One line of the report. A warning or an error has a remedy."""

    check: str
    level: Level
    text: str
    remedy: str = ""


Findings = Iterator[Finding]
Check = Callable[[Recipe], Findings]


def ok(check: str, text: str) -> Finding:
    """Nothing to do."""
    return Finding(check, "ok", text)


def warning(check: str, text: str, remedy: str) -> Finding:
    """The run starts, but perhaps not as it is meant."""
    return Finding(check, "warning", text, remedy)


def error(check: str, text: str, remedy: str) -> Finding:
    """The run would not start, or would not end."""
    return Finding(check, "error", text, remedy)


def findings_of(check: str, problems: Iterable[Problem]) -> Findings:
    """What training itself refuses or warns of, as lines of the report."""
    for problem in problems:
        yield Finding(check, problem.level, problem.text, problem.remedy)
