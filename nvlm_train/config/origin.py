"""Who states a key of a composed recipe: the command line, or which of its files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

_PACKAGE_LINE = re.compile(r"^#\s*@package\s+(\S+)", re.MULTILINE)


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

    @staticmethod
    def read(
        choices: Mapping[str, str | None], overrides: Sequence[str], directories: Sequence[Path]
    ) -> Sources:
        """Reads the chosen files.

        Args:
            choices: `group` or `group@mount` to the chosen file's name without .yaml.
            overrides: the command line.
            directories: where groups lie.
        """
        found: list[SourceFile] = []
        for key, choice in choices.items():
            group, _, mount = key.partition("@")
            if group.startswith("hydra") or choice is None:
                continue
            for directory in directories:
                path = directory / group / f"{choice}.yaml"
                if path.is_file():
                    text = path.read_text(encoding="utf-8")
                    name = path.relative_to(directory.parent).as_posix()
                    place = _mount(group, mount, text)
                    found.append(SourceFile(place, name, yaml.safe_load(text)))
        keys = tuple(each.lstrip("+~").partition("=")[0] for each in overrides)
        return Sources(tuple(found), keys)

    def find(self, dotted: str) -> str | None:
        """The last one to state a dotted key, or none when nobody does."""
        dotted = re.sub(r"\[\d+\]", "", dotted)
        if dotted in self.command_line:
            return "the command line"
        for file in reversed(self.files):
            inside = not file.mount or dotted.startswith(f"{file.mount}.")
            relative = dotted.removeprefix(f"{file.mount}.") if file.mount else dotted
            if inside and _holds(file.content, relative.split(".")):
                return file.name
        return None


def _mount(group: str, mount: str, text: str) -> str:
    stated = _PACKAGE_LINE.search(text)
    if stated:
        return "" if stated.group(1) == "_global_" else stated.group(1)
    return mount or group.replace("/", ".")


def _holds(content: object, keys: Sequence[str]) -> bool:
    for key in keys:
        if not isinstance(content, Mapping) or key not in content:
            return False
        content = content[key]
    return True
