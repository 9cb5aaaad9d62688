"""Who states a key of a composed recipe: the command line, or which of its files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml


@dataclass(frozen=True)
class SourceFile:
    """One file of a recipe."""

    mount: str
    """Dotted place of its keys in the recipe; empty for the root."""
    name: str
    """As messages show it: recipes/stage/d_sft.yaml."""
    content: object


@dataclass(frozen=True)
class Sources:
    """Everything a recipe was composed of; later files win over earlier ones."""

    files: tuple[SourceFile, ...]
    command_line: tuple[str, ...]
    """Keys that were set there."""
    completed: Mapping[str, str] = field(default_factory=dict)
    """Keys that no one states and that were read from a file, with its name."""

    @staticmethod
    def read(
        composed: Sequence[tuple[str, str]],
        command_line: Sequence[str],
        directories: Sequence[Path],
    ) -> Sources:
        """Reads the files of a recipe.

        Args:
            composed: each file's path below a directory of recipes, without .yaml, and the dotted place of
                its keys, empty for the root; in the order in which Hydra merges them.
            command_line: the dotted keys that are set there.
            directories: where groups lie.
        """
        found: list[SourceFile] = []
        for path, mount in composed:
            for directory in directories:
                file = directory / f"{path}.yaml"
                if file.is_file():
                    name = file.relative_to(directory.parent).as_posix()
                    content = yaml.safe_load(file.read_text(encoding="utf-8"))
                    found.append(SourceFile(mount, name, content))
        return Sources(tuple(found), tuple(command_line))

    def find(self, dotted: str) -> str | None:
        """The last one to state a dotted key, or none when nobody does."""
        dotted = re.sub(r"\[\d+\]", "", dotted)
        if dotted in self.completed:
            return self.completed[dotted]
        place = self.place(dotted)
        if place == len(self.files):
            return "the command line"
        return self.files[place].name if place >= 0 else None

    def place(self, dotted: str) -> int:
        """Where a key is stated last: later places win over earlier ones; -1 where nobody states it."""
        # `model.language=null` states all below it; `model=NAME` is the choice of a file.
        above = (key for key in self.command_line if "." in key)
        if dotted in self.command_line or any(dotted.startswith(f"{key}.") for key in above):
            return len(self.files)
        places = range(len(self.files) - 1, -1, -1)
        return next((place for place in places if _states(self.files[place], dotted)), -1)


def _states(file: SourceFile, dotted: str) -> bool:
    inside = not file.mount or dotted.startswith(f"{file.mount}.")
    relative = dotted.removeprefix(f"{file.mount}.") if file.mount else dotted
    return inside and _holds(file.content, relative.split("."))


def _holds(content: object, keys: Sequence[str]) -> bool:
    for key in keys:
        if not isinstance(content, Mapping) or key not in content:
            return False
        content = content[key]
    return True
