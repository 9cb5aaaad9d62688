"""The result of a check: one line, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from nvlm_train.convert.problem import Problem

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """Holds one line of the report. A warning or an error has a remedy."""

    check: str
    level: Level
    text: str
    remedy: str = ""


Findings = Iterator[Finding]


def ok(check: str, text: str) -> Finding:
    """Makes a finding that asks for nothing."""
    return Finding(check, "ok", text)


def warning(check: str, text: str, remedy: str) -> Finding:
    """Makes a finding about a run that starts, but perhaps not as it is meant."""
    return Finding(check, "warning", text, remedy)


def error(check: str, text: str, remedy: str) -> Finding:
    """Makes a finding about a run that would not start, or would fail."""
    return Finding(check, "error", text, remedy)


def findings_of(check: str, problems: Iterable[Problem]) -> Findings:
    """Turns problems that training itself refuses or warns about into lines of the report."""
    for problem in problems:
        yield Finding(check, problem.level, problem.text, problem.remedy)
