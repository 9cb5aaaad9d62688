"""Plain mappings to frozen dataclasses, with every problem reported at once. Knows types, no rules."""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from nvlm_train.errors import ConfigError

T = TypeVar("T")

Origin = Callable[[str], str | None]
"""Dotted key to the file (or the command line) that states it, or none when nobody knows."""

MANDATORY = "???"
"""OmegaConf's mark of a value that has to be stated; the same as a missing key."""


class _Invalid:
    """A value that could not be built; its problem is already in the list."""


_INVALID = _Invalid()


@dataclass(frozen=True)
class _Report:
    """Collects problems, and says for each key where it was written."""

    origin: Origin
    problems: list[str] = field(default_factory=list)

    def add(self, path: str, claim: str, remedy: str) -> _Invalid:
        where = self.origin(path) if path else None
        source = f" (stated in {where})" if where else ""
        self.problems.append(f"{path or 'the document'}{claim}{source}; {remedy}")
        return _INVALID


def build(cls: type[T], raw: object, *, path: str = "", origin: Origin = lambda _: None) -> T:
    """Makes a `cls` of a mapping such as a YAML document.

    Args:
        cls: a dataclass whose fields are bool, int, float, str, Literal, dataclasses, `X | None`,
            `tuple[X, ...]`, `Literal[...] | tuple[Literal[...], ...]` or `Mapping[str, X]`.
        raw: what the document holds.
        path: dotted prefix of the messages.
        origin: names the file that states a dotted key.

    Raises:
        ConfigError: unknown keys, missing keys and values of another type; all of them.
    """
    report = _Report(origin)
    value = _build_dataclass(cls, raw, path, report)
    if report.problems:
        raise ConfigError(report.problems)
    if not isinstance(value, cls):
        raise AssertionError(f"{cls.__name__}: no problem was reported, and nothing was built")
    return value


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _build(hint: Any, raw: object, path: str, report: _Report) -> object:
    kind, args = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        return _build_union(args, raw, path, report)
    if kind is Literal:
        return _build_choice(args, raw, path, report)
    if kind is tuple:
        return _build_tuple(args[0], raw, path, report)
    if kind is Mapping:
        return _build_mapping(args[1], raw, path, report)
    if is_dataclass(hint):
        return _build_dataclass(hint, raw, path, report)
    return _build_scalar(hint, raw, path, report)


def _build_union(args: tuple[Any, ...], raw: object, path: str, report: _Report) -> object:
    """Builds `X | None`, or a choice of words or a list of others."""
    if raw is None and type(None) in args:
        return None
    inner, *lists = (arg for arg in args if arg is not type(None))
    if not lists:
        return _build(inner, raw, path, report)
    (words,) = lists
    if isinstance(raw, Sequence) and not isinstance(raw, str):
        return _build(words, raw, path, report)
    if raw in get_args(inner):
        return raw
    choices = ", ".join(get_args(inner))
    listed = ", ".join(get_args(get_args(words)[0]))
    claim = f"={raw} is neither one of {choices} nor a list"
    return report.add(path, claim, f"use {choices} or a list of these: {listed}")


def _build_choice(choices: tuple[Any, ...], raw: object, path: str, report: _Report) -> object:
    # YAML 1.1 reads a bare `off` as false; where `off` is a choice, that is what was meant.
    if raw is False and "off" in choices:
        return "off"
    if any(type(raw) is type(choice) and raw == choice for choice in choices):
        return raw
    listed = ", ".join(str(choice) for choice in choices)
    near = _nearest(str(raw), [str(choice) for choice in choices])
    return report.add(path, f"={raw} is not one of {listed}", f"use {near or listed}")


def _build_tuple(item: Any, raw: object, path: str, report: _Report) -> object:
    if not isinstance(raw, Sequence) or isinstance(raw, str):
        return _wrong_type(path, raw, "a list", report)
    values = [_build(item, each, f"{path}[{index}]", report) for index, each in enumerate(raw)]
    return _INVALID if any(value is _INVALID for value in values) else tuple(values)


def _build_mapping(item: Any, raw: object, path: str, report: _Report) -> object:
    if not isinstance(raw, Mapping):
        return _wrong_type(path, raw, "a mapping", report)
    values = {str(key): _build(item, each, _join(path, key), report) for key, each in raw.items()}
    return _INVALID if any(value is _INVALID for value in values.values()) else values


def _build_dataclass(cls: Any, raw: object, path: str, report: _Report) -> object:
    if not isinstance(raw, Mapping):
        return _wrong_type(path, raw, f"a mapping with the keys {', '.join(_names(cls))}", report)
    names, hints = _names(cls), get_type_hints(cls)
    for key in raw:
        if key not in names:
            _unknown(_join(path, key), str(key), raw[key], names, report)
    values: dict[str, object] = {}
    for each in fields(cls):
        key = _join(path, each.name)
        if each.name in raw and raw[each.name] != MANDATORY:
            values[each.name] = _build(hints[each.name], raw[each.name], key, report)
        elif _is_required(each) or each.name in raw:
            report.add(key, " is missing", f"state {_describe(hints[each.name])} for it")
    complete = all(each.name in values or not _is_required(each) for each in fields(cls))
    if not complete or any(value is _INVALID for value in values.values()):
        return _INVALID
    return cls(**values)


def _build_scalar(hint: Any, raw: object, path: str, report: _Report) -> object:
    if hint is float:
        return _build_float(raw, path, report)
    return raw if type(raw) is hint else _wrong_type(path, raw, _describe(hint), report)


def _build_float(raw: object, path: str, report: _Report) -> object:
    # YAML 1.1 reads 1e-4, which has no dot, as a string.
    if isinstance(raw, bool) or not isinstance(raw, int | float | str):
        return _wrong_type(path, raw, _describe(float), report)
    try:
        value = float(raw)
    except ValueError:
        return _wrong_type(path, raw, _describe(float), report)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        # Neither compares with a limit as a number does, so that no rule would refuse it.
        return report.add(path, f"={raw} is not finite", "give a finite number")
    return value


def _wrong_type(path: str, raw: object, wanted: str, report: _Report) -> _Invalid:
    shown = "null" if raw is None else f"{raw} ({type(raw).__name__})"
    return report.add(path, f"={shown} has the wrong type", f"give {wanted}")


def _unknown(path: str, key: str, raw: object, names: Sequence[str], report: _Report) -> None:
    near = _nearest(key, names)
    shown = "" if isinstance(raw, Mapping) else f"={raw}"
    remedy = f"did you mean {near}?" if near else f"known keys: {', '.join(names)}"
    report.add(path, f"{shown} is an unknown key", remedy)


def _nearest(word: str, known: Sequence[str]) -> str | None:
    matches = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return matches[0] if matches else None


def _names(cls: Any) -> list[str]:
    return [each.name for each in fields(cls)]


def _is_required(each: Field[Any]) -> bool:
    return each.default is MISSING and each.default_factory is MISSING


def _describe(hint: Any) -> str:
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
    if hint in words:
        return words[hint]
    kind, args = get_origin(hint), get_args(hint)
    if kind is Literal:
        return "one of " + ", ".join(str(choice) for choice in args)
    if kind is tuple:
        return "a list"
    if type(None) in args:
        return f"{_describe(next(each for each in args if each is not type(None)))} or null"
    return "a mapping"
