"""Writes the reference pages beside this file from the code. Imports no torch.

python docs/reference/generate.py

recipe.md comes from `config/schema.py` and `model_schema.py` beside it, metrics.md from the
dataclasses of METRICS. In both, a field's annotation, its default and the docstring under it are all
there is to say; the docstring ends with the field's unit in brackets.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from nvlm_train.config import schema

HERE = Path(__file__).parent
PACKAGE = Path(inspect.getfile(schema)).parent.parent
SCHEMA = "config/schema.py"
MODEL_SCHEMA = "config/model_schema.py"
COMMAND = "python docs/reference/generate.py"

METRICS = (
    ("train/tracking/step_record.py", "StepRecord", "{field}"),
    ("train/tracking/step_record.py", "SourceRecord", "{field}/SOURCE"),
    ("train/part_timer.py", "PartSeconds", "seconds/{field}"),
    ("train/tracking/step_record.py", "PartSpeed", "{field}/PART"),
    ("train/tracking/step_record.py", "BesideSeconds", "seconds/{field}"),
    ("train/tracking/step_record.py", "PeakShare", "{field}"),
    ("train/tracking/step_record.py", "PartPeakShare", "{field}/PART"),
    ("train/health/stragglers.py", "SlowestRank", "{field}"),
    ("train/health/losses.py", "NotFiniteStep", "{field}"),
)
"""Where a line of metrics.jsonl comes from: file, dataclass, and what the line calls a field of it."""


@dataclass(frozen=True)
class Description:
    """What a docstring under a field says."""

    text: str
    unit: str

    @classmethod
    def of(cls, docstring: str) -> Description:
        """Takes the unit, in brackets at the end, off the text.

        >>> Description.of("A pack has this many tokens. [tokens]")
        Description(text='A pack has this many tokens.', unit='tokens')
        """
        plain = " ".join(docstring.split())
        match = re.fullmatch(r"(.*) \[([^]]+)\]", plain)
        return cls(match[1], match[2]) if match else cls(plain, "")


@dataclass(frozen=True)
class Docstrings:
    """What the source says of one class."""

    name: str
    lead: str
    fields: Mapping[str, Description]
    annotations: Mapping[str, str]

    def of(self, field: str) -> Description:
        """What is said of a field.

        Raises:
            LookupError: nothing is.
        """
        if field not in self.fields:
            raise LookupError(
                f"{self.name}.{field} has no docstring under it; write a sentence there"
            )
        return self.fields[field]


def read_class(path: Path, name: str) -> Docstrings:
    """Reads a class from a source file, without importing it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    (found,) = (each for each in tree.body if isinstance(each, ast.ClassDef) and each.name == name)
    described: dict[str, Description] = {}
    annotations: dict[str, str] = {}
    for node, following in zip(found.body, [*found.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            annotations[node.target.id] = ast.unparse(node.annotation)
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                described[node.target.id] = Description.of(str(following.value.value))
    lead = " ".join((ast.get_docstring(found) or "").split())
    return Docstrings(name, lead, described, annotations)


def file_of(cls: type) -> str:
    """The file of a class, from the package on."""
    return Path(inspect.getfile(cls)).relative_to(PACKAGE).as_posix()


# ---- the recipe ----


@dataclass(frozen=True)
class Group:
    """A recipe group: a dotted place in the recipe and the dataclass that describes it."""

    path: str
    cls: type
    is_optional: bool = False

    @property
    def title(self) -> str:
        """The heading of its section."""
        return self.path or "top level"

    def place(self, field: str) -> str:
        """The dotted path of a field."""
        return f"{self.path}.{field}" if self.path else field


def groups(group: Group) -> Iterator[Group]:
    """A group, then the groups in it, in the order of the schema."""
    yield group
    hints = get_type_hints(group.cls)
    for each in fields(group.cls):
        inner = inner_group(group.place(each.name), hints[each.name])
        if inner is not None:
            yield from groups(inner)


def inner_group(path: str, hint: Any) -> Group | None:
    """The group that a field is, or none for a field with a value."""
    if is_dataclass(hint) and isinstance(hint, type):
        return Group(path, hint)
    if get_origin(hint) in (Union, UnionType):
        (some, *others) = [each for each in get_args(hint) if each is not NoneType]
        inner = None if others else inner_group(path, some)
        return Group(path, inner.cls, is_optional=True) if inner else None
    if get_origin(hint) is Mapping:
        return inner_group(f"{path}.NAME", get_args(hint)[1])
    return None


def is_group(hint: Any) -> bool:
    """Whether a field is a group; its class's docstring is then description enough."""
    return inner_group("", hint) is not None


def type_words(hint: Any) -> str:
    """A type as a table shows it: the allowed literals, `whole number`, `list of text`."""
    kind, args = get_origin(hint), get_args(hint)
    if kind is Literal:
        return " | ".join(f"`{each}`" for each in args)
    if kind in (Union, UnionType):
        return " | ".join("`null`" if each is NoneType else type_words(each) for each in args)
    if kind is tuple:
        return f"list of {type_words(args[0])}"
    words = {bool: "`true` | `false`", int: "whole number", float: "number", str: "text"}
    return words[hint]


def default_words(field: Field[Any]) -> str:
    """A default as YAML writes it, or `required`."""
    value = field.default
    if field.default_factory is not MISSING:
        value = field.default_factory()
    if value is MISSING:
        return "required"
    if value is None or isinstance(value, bool):
        return f"`{'null' if value is None else str(value).lower()}`"
    return f"`{value}`"


def recipe_section(group: Group) -> Iterator[str]:
    """The lines of a group's section; groups in it have sections of their own."""
    said = read_class(PACKAGE / file_of(group.cls), group.cls.__name__)
    hints = get_type_hints(group.cls)
    rows = [
        recipe_row(group, each, hints[each.name], said.of(each.name))
        for each in fields(group.cls)
        if each.name in said.fields or not is_group(hints[each.name])
    ]
    yield from (f"## {group.title}", "", said.lead)
    if group.is_optional:
        yield "The group may be absent."
    if rows:
        yield from (
            "",
            "| field | type | default | unit | meaning |",
            "|---|---|---|---|---|",
            *rows,
        )
    yield ""


def recipe_row(group: Group, field: Field[Any], hint: Any, said: Description) -> str:
    """A field's line."""
    place = group.place(field.name)
    inner = inner_group(place, hint)
    kind = f"[group](#{anchor(inner.title)})" if inner else type_words(hint)
    return row(f"`{place}`", kind, default_words(field), said.unit, said.text)


def recipe_page() -> str:
    """recipe.md."""
    lines = [
        "# Every field of a recipe",
        "",
        written_by(f"nvlm_train/{SCHEMA}", f"nvlm_train/{MODEL_SCHEMA}"),
        "",
        "A section is a recipe group: a mapping in a YAML file. `NAME` stands for a stage's name.",
        "[recipes.md](../recipes.md) says how files are composed; the rules that span several fields",
        "are in `nvlm_train/config/rules.py`.",
        "",
    ]
    return page(lines, (recipe_section(each) for each in groups(Group("", schema.Recipe))))


# ---- metrics.jsonl ----


def metrics_section(file: str, name: str, pattern: str) -> Iterator[str]:
    """The lines about one dataclass that goes into records."""
    said = read_class(PACKAGE / file, name)
    words = {"str": "text", "int": "whole number", "float": "number"}
    yield from (f"## {name}", "", f"{said.lead} (`nvlm_train/{file}`)", "")
    yield from ("| field | type | unit | meaning |", "|---|---|---|---|")
    for field, annotation in said.annotations.items():
        each = said.of(field)
        yield row(f"`{pattern.format(field=field)}`", words[annotation], each.unit, each.text)
    yield ""


def metric_names() -> dict[str, list[str]]:
    """Name of a dataclass of METRICS -> the names, or patterns, that its fields have in a line."""
    return {
        name: [pattern.format(field=each) for each in read_class(PACKAGE / file, name).annotations]
        for file, name, pattern in METRICS
    }


def metrics_page() -> str:
    """metrics.md."""
    lines = [
        "# Every field of metrics.jsonl",
        "",
        written_by(*dict.fromkeys(f"nvlm_train/{file}" for file, _, _ in METRICS)),
        "",
        "Rank 0 writes RUN_DIR/metrics.jsonl, one JSON object a step, before the next step starts; wandb",
        "gets the same names. `SOURCE` stands for the name of a source of the blend, `PART` for a part of",
        "the step that has FLOPs: `encode`, `layers` or `output`. A number that is not finite is written as",
        "`NaN` or `Infinity`, which Python's `json` reads.",
        "",
    ]
    return page(lines, (metrics_section(*each) for each in METRICS))


# ---- Markdown ----


def written_by(*sources: str) -> str:
    """The note that keeps people from editing a page."""
    listed = "\n".join(f"  {each}" for each in sources)
    return f"<!-- Written by `{COMMAND}` from\n{listed}\nEdit those. -->"


def anchor(title: str) -> str:
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def row(*cells: str) -> str:
    """A line of a table; a cell without text holds a dash."""
    shown = ("-" if each in ("", "none") else each.replace("|", r"\|") for each in cells)
    return f"| {' | '.join(shown)} |"


def page(head: list[str], sections: Iterable[Iterable[str]]) -> str:
    """A page's text, with one line break at its end."""
    lines = [*head, *(line for section in sections for line in section)]
    return "\n".join(lines).rstrip("\n") + "\n"


PAGES = {"recipe.md": recipe_page, "metrics.md": metrics_page}
"""File beside this one to what it holds."""


if __name__ == "__main__":
    for file, text in PAGES.items():
        (HERE / file).write_text(text(), encoding="utf-8")
