"""Shows findings as they are made: in colour on a terminal, as plain lines in a log; writes them as JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.text import Text

from nvlm_train.doctor.finding import Finding, Findings

_COLOURS = {"ok": "green", "warning": "yellow", "error": "bold red"}
_WIDTH = 7 + 2 + 12


class Report:
    """Collects findings and prints each at once."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self._console = Console(soft_wrap=True, highlight=False)

    def take(self, findings: Findings) -> None:
        """Collects findings, and prints each when it is made."""
        for finding in findings:
            self.findings.append(finding)
            self._show(finding)

    @property
    def num_errors(self) -> int:
        return sum(finding.level == "error" for finding in self.findings)

    def end(self) -> None:
        """Prints the number of findings by level."""
        levels = [finding.level for finding in self.findings]
        self._console.print(
            f"{levels.count('ok')} ok, {levels.count('warning')} warning(s), {self.num_errors} error(s)"
        )
        sys.stdout.flush()

    def write(self, path: str) -> None:
        """Writes the findings to a file as one JSON object."""
        content = {"errors": self.num_errors, "findings": [asdict(each) for each in self.findings]}
        Path(path).write_text(json.dumps(content, indent=1) + "\n")

    def _show(self, finding: Finding) -> None:
        first, *more = finding.text.splitlines() or [""]
        line = Text(f"{finding.level:7}", style=_COLOURS[finding.level])
        self._console.print(line.append(f"  {finding.check:12}{first}", style="default"))
        remedy = [f"-> {finding.remedy}"] if finding.remedy else []
        for text in (*more, *remedy):
            self._console.print(Text(" " * _WIDTH + text))
        sys.stdout.flush()
