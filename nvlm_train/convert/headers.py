"""Names, shapes and dtypes of the tensors in a directory of safetensors files: headers only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nvlm_train.convert.problem import Problem, error

INDEX = "model.safetensors.index.json"
_AGAIN = "copy the directory again"
_SAVED_ANEW = (
    "if you trust them, from_pretrained(DIRECTORY) and save_pretrained(ANOTHER) of transformers write "
    "them as safetensors; many repositories have such files beside these"
)
_OTHERS = (
    (
        (".bin", ".pt", ".pth", ".ckpt", ".pkl"),
        "pickled weights are not read: opening them runs any code that is in them, and a rank could not "
        "read its slices alone",
        _SAVED_ANEW,
    ),
    ((".h5", ".msgpack"), "weights of TensorFlow and Flax are not read", _SAVED_ANEW),
    ((".gguf",), "a GGUF file is no directory of safetensors", "convert it: nvlm convert gguf"),
)
"""Other files of weights by their endings, why they are not read, and the remedy."""


@dataclass(frozen=True)
class Stored:
    """A tensor as its file's header describes it."""

    shape: tuple[int, ...]
    dtype: str
    """safetensors' name: F32, BF16, F16, F8_E4M3, I8."""
    path: Path
    prefix: str = ""
    """Its name in the file begins with this, where it is listed without (`whole/parts.py`)."""


@dataclass
class Headers:
    """All tensors of a directory, and what is wrong with its files."""

    tensors: dict[str, Stored] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    """Files that are missing or cannot be read: tensors that are not listed may be in them."""


def read_headers(directory: Path, setting: str) -> Headers:
    """Reads the headers of every `*.safetensors` in a directory. No tensor is read.

    Args:
        directory: with one file, or several and their index, as save_pretrained writes them.
        setting: how messages name the directory: `model.language.weights=DIRECTORY`.
    """
    found = Headers()
    for path in _files(directory):
        _read_file(path, setting, found)
    if not found.tensors and not found.problems:
        found.problems.append(_nothing(directory, setting))
    if (directory / INDEX).is_file():
        found.problems += _index_problems(directory, setting, found)
    if (directory / "adapter_config.json").is_file():
        found.problems.append(
            error(
                f"{setting}: adapter_config.json: an adapter lies there, which would be left out",
                "merge it into the weights (peft: merge_and_unload) and save them, or remove it",
            )
        )
    return found


def _files(directory: Path) -> list[Path]:
    """The files that transformers would read.

    Repositories of Mistral have the same weights once more, under names of their own, in
    `consolidated.safetensors`. Where nothing else is there, it is read, and its names are refused.
    """
    there = sorted(directory.glob("*.safetensors"))
    return [path for path in there if not path.name.startswith("consolidated")] or there


def _nothing(directory: Path, setting: str) -> Problem:
    """Why nothing can be read: other files than those of safetensors, or none."""
    for endings, reason, remedy in _OTHERS:
        there = sorted(path.name for path in directory.glob("*") if path.suffix in endings)
        if there:
            more = f" and {len(there) - 1} more" if len(there) > 1 else ""
            return error(
                f"{setting}: no *.safetensors there, but {there[0]}{more}: {reason}", remedy
            )
    return error(
        f"{setting}: no *.safetensors there", "give a directory that save_pretrained wrote"
    )


def _read_file(path: Path, setting: str, found: Headers) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as handle:
            tensors = {name: _stored(handle, name, path) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as problem:
        found.unread.append(path.name)
        text = f"{setting}: {path.name} is not a whole safetensors file: {problem}"
        found.problems.append(error(text, _AGAIN))
        return
    twice: dict[str, list[str]] = {}
    for name in sorted(tensors.keys() & found.tensors.keys()):
        twice.setdefault(found.tensors[name].path.name, []).append(name)
    for first, names in twice.items():
        found.problems.append(
            error(
                f"{setting}: {names[0]} is in two files, {first} and {path.name}{_others(names)}",
                "leave the files of one checkpoint in the directory",
            )
        )
    found.tensors |= tensors


def _stored(handle: Any, name: str, path: Path) -> Stored:
    part = handle.get_slice(name)
    return Stored(tuple(part.get_shape()), str(part.get_dtype()), path)


def _index_problems(directory: Path, setting: str, found: Headers) -> Iterator[Problem]:
    try:
        weight_map = json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        yield error(f"{setting}: {INDEX} cannot be read: {problem!r}", _AGAIN)
        return
    there = {path.name for path in _files(directory)}
    for file in sorted(set(files.values()) - there):
        found.unread.append(file)
        yield error(f"{setting}: {INDEX} names {file}, which is not there", _AGAIN)
    for file in sorted(there - set(files.values())):
        yield error(
            f"{setting}: {file} is there, but {INDEX} does not name it",
            "leave the files of one checkpoint in the directory",
        )
    yield from _disagreements(files, setting, found)


def _disagreements(files: dict[str, str], setting: str, found: Headers) -> Iterator[Problem]:
    """Tensors that the index places elsewhere than the headers, a line for each file."""
    absent: dict[str, list[str]] = {}
    for name, file in sorted(files.items()):
        stored = found.tensors.get(name)
        if file not in found.unread and (stored is None or stored.path.name != file):
            absent.setdefault(file, []).append(name)
    for file, names in absent.items():
        yield error(
            f"{setting}: no tensor named {names[0]} in {file}, where {INDEX} has it"
            f"{_others(names)}",
            _AGAIN,
        )
    extra: dict[str, list[str]] = {}
    for name in sorted(found.tensors.keys() - files.keys()):
        extra.setdefault(found.tensors[name].path.name, []).append(name)
    for file in sorted(extra.keys() & set(files.values())):
        yield error(
            f"{setting}: {extra[file][0]} in {file} is not named by {INDEX}{_others(extra[file])}",
            _AGAIN,
        )


def _others(names: list[str]) -> str:
    return f" ({len(names) - 1} more)" if len(names) > 1 else ""
