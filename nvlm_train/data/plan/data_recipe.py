"""Data recipes: `data_recipes/NAME.yaml` as a blend of named, weighted sources, and their shards.

A source names shards, or the `NAME.manifest.json` that `nvlm data prepare` writes beside them. A
recipe that names the manifest holds for any number of shards, and a shard lost on the way is an
error, not a smaller source.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, cast, get_args

import yaml

from nvlm_train.data.formats import RAW_FORMATS
from nvlm_train.data.shards.fields import OWN_FIELDS, FieldMapping, read_fields
from nvlm_train.data.shards.manifest import check_format
from nvlm_train.data.shards.store import Store
from nvlm_train.data.shards.tar import expand_pattern
from nvlm_train.errors import ConfigError, ShardError

WeightBy = Literal["samples", "trained_tokens"]
FORMAT = 1
"""The format of data recipes; a file need not state it."""
MANIFEST_SUFFIX = ".manifest.json"


@dataclass(frozen=True)
class SourceConfig:
    """One source of a data recipe."""

    name: str
    shards: tuple[str, ...]
    """Names after brace expansion, as written in the recipe."""
    weight: float = 1.0
    epochs: float | None = None
    """Times its samples are drawn before the source leaves the blend; none for without end."""
    max_samples: int | None = None
    """Draws, repeated ones included, after which the source leaves the blend."""
    fields: FieldMapping = OWN_FIELDS
    """Where records lie in tars that somebody else made."""
    task: str = ""
    """What is asked about the images: captioning, charts, ...; it groups sources in reports."""
    layout: str = ""
    """The format of `nvlm data prepare` that makes the shards."""
    licence: str = ""
    """The place where the licence can be read."""
    note: str = ""
    """Anything else its user should know: which files, which part, whose weight."""

    @property
    def remedy(self) -> str:
        """The words that tell somebody who lacks the shards how to get them."""
        layout = self.layout or "FORMAT"
        command = f"nvlm data prepare {layout} INPUT --out DIR --name {self.name}"
        parts = [f"write them with `{command}`"]
        parts += [self.note] if self.note else []
        parts += [f"licence: {self.licence}"] if self.licence else []
        return "; ".join(parts)


_DESCRIPTIONS = ("task", "layout", "licence", "note")
"""Keys of a source that decide nothing about a run; they are for people."""


@dataclass(frozen=True)
class Blend:
    """A data recipe: sources and the shares in which they are drawn from."""

    name: str
    sources: tuple[SourceConfig, ...]
    weight_by: WeightBy = "samples"
    """Says whether weights are shares of the samples drawn or of the tokens trained on."""
    note: str = ""
    """Anything its user should know of the whole blend."""


def read_blend(name: str, recipes_dir: str) -> Blend:
    """Reads the data recipe `recipes_dir/name.yaml`, or the file itself when `name` is a path.

    Raises:
        ConfigError: missing file, unknown or missing key, bad weight, bad pattern; all at once.
    """
    is_path = name.endswith((".yaml", ".yml"))
    path = Path(name) if is_path else Path(recipes_dir) / f"{name}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in Path(recipes_dir).glob("*.yaml"))
        raise ConfigError(
            [f"blend={name}: {path} does not exist{_nearest(name, known)}; have {known}"]
        )
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError([f"blend={name}: {path} is not YAML: {error}"]) from error
    problems: list[str] = []
    _check_format(content, str(path))
    sources = _sources(content, str(path), problems)
    weight_by = _weight_by(content, str(path), problems)
    if problems:
        raise ConfigError(problems)
    return Blend(path.stem, sources, weight_by, _description(content, "note"))


def list_shards(blend: Blend, store: Store) -> Blend:
    """Returns the blend with every manifest replaced by the shards it lists, which lie beside it.

    Raises:
        ShardError: a manifest that is missing or is none.
    """
    sources = [
        replace(source, shards=_shard_names(blend.name, source, store)) for source in blend.sources
    ]
    return replace(blend, sources=tuple(sources))


def missing_shard(blend: str, source: SourceConfig, name: str, store: Store) -> ShardError:
    """Returns the error for a shard or manifest that is not there: whose it is, how to get it."""
    return ShardError(
        f"missing shard={store.path(name)}: blend={blend} source={source.name} names "
        f"{name}, and relative names start at loader.data_root={store.root}; correct either, or "
        f"{source.remedy}"
    )


def _shard_names(blend: str, source: SourceConfig, store: Store) -> tuple[str, ...]:
    names: list[str] = []
    for name in source.shards:
        is_manifest = name.endswith(MANIFEST_SUFFIX)
        names += _listed(blend, source, name, store) if is_manifest else [name]
    return tuple(names)


def _listed(blend: str, source: SourceConfig, name: str, store: Store) -> list[str]:
    """Returns the names of the shards that a manifest lists."""
    path = store.path(name)
    try:
        content = json.loads(store.read(name))
        check_format(content, path)
        files = [str(shard["file"]) for shard in content["shards"]]
    except FileNotFoundError as error:
        raise missing_shard(blend, source, name, store) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardError(
            f"manifest={path} cannot be read ({type(error).__name__}: {error}); blend={blend} "
            f"source={source.name} names it; {source.remedy}"
        ) from error
    directory = name.rpartition("/")[0]
    return [f"{directory}/{file}" if directory else file for file in files]


def _check_format(content: object, path: str) -> None:
    stated = content.get("format", FORMAT) if isinstance(content, dict) else FORMAT
    if stated != FORMAT:
        raise ConfigError(
            [
                f"{path}: format={stated!r}: this nvlm-train reads data recipes of format {FORMAT}; use the "
                "nvlm-train that it was written for, or rewrite it as CHANGELOG.md says"
            ]
        )


def _weight_by(content: object, path: str, problems: list[str]) -> WeightBy:
    value = content.get("weight_by", "samples") if isinstance(content, dict) else "samples"
    for known in get_args(WeightBy):
        if value == known:
            return cast(WeightBy, known)
    problems.append(f"{path}: weight_by={value!r} must be one of {', '.join(get_args(WeightBy))}")
    return "samples"


def _sources(content: object, path: str, problems: list[str]) -> tuple[SourceConfig, ...]:
    if not isinstance(content, dict) or not isinstance(content.get("sources"), list):
        problems.append(f"{path}: must have a list `sources:` of name, shards, weight")
        return ()
    _check_keys(content, ["sources", "weight_by", "note", "format"], path, problems)
    _check_descriptions(content, ["note"], path, problems)
    found: list[SourceConfig] = []
    for number, item in enumerate(content["sources"]):
        where = f"{path}: sources[{number}]"
        source = _source(item, where, problems)
        if source is not None and source.name in [other.name for other in found]:
            problems.append(f"{where}.name={source.name} occurs twice; names tell sources apart")
        elif source is not None:
            found.append(source)
    if not found and not problems:
        problems.append(f"{path}: sources is empty; name at least one")
    return tuple(found)


def _source(item: object, where: str, problems: list[str]) -> SourceConfig | None:
    if not isinstance(item, dict):
        problems.append(f"{where}={item!r} must be a mapping of name, shards, weight")
        return None
    before = len(problems)
    _check_keys(item, [field.name for field in fields(SourceConfig)], where, problems)
    name, weight = item.get("name"), item.get("weight", 1.0)
    if not isinstance(name, str) or not name:
        problems.append(f"{where}.name={name!r} must be text; it names the source in reports")
    if not _is_positive(weight, int | float):
        problems.append(
            f"{where}.weight={weight!r} must be a positive number; leave unused sources out"
        )
    epochs, max_samples = item.get("epochs"), item.get("max_samples")
    if epochs is not None and not _is_positive(epochs, int | float):
        problems.append(f"{where}.epochs={epochs!r} must be a positive number, or left out")
    if max_samples is not None and not _is_positive(max_samples, int):
        problems.append(f"{where}.max_samples={max_samples!r} must be a whole number above 0")
    _check_descriptions(item, _DESCRIPTIONS, where, problems)
    if "layout" in item and item["layout"] not in RAW_FORMATS:
        problems.append(
            f"{where}.layout={item['layout']!r} must be a format of `nvlm data prepare`: "
            f"{', '.join(RAW_FORMATS)}"
        )
    shards = _shards(item.get("shards"), where, problems)
    mapping = read_fields(item.get("fields"), f"{where}.fields", problems)
    if len(problems) > before:
        return None
    described = {key: _description(item, key) for key in _DESCRIPTIONS}
    return SourceConfig(str(name), shards, float(weight), epochs, max_samples, mapping, **described)


def _is_positive(value: Any, kind: Any) -> bool:
    if not isinstance(value, kind) or isinstance(value, bool):
        return False
    try:
        return 0 < float(value) < float("inf")
    except OverflowError:  # a whole number that no float can hold
        return False


def _check_descriptions(
    item: Mapping[str, Any], keys: Sequence[str], where: str, problems: list[str]
) -> None:
    for key in keys:
        value = item.get(key, "none")
        if not isinstance(value, str) or not value.strip():
            problems.append(
                f"{where}.{key}={value!r} must be text; leave it out where none is known"
            )


def _description(item: Mapping[str, Any], key: str) -> str:
    """Returns the text on one line, however YAML folded it."""
    return " ".join(str(item.get(key, "")).split())


def _shards(value: object, where: str, problems: list[str]) -> tuple[str, ...]:
    patterns = [value] if isinstance(value, str) else value
    if (
        not isinstance(patterns, list)
        or not patterns
        or not all(isinstance(p, str) for p in patterns)
    ):
        problems.append(
            f"{where}.shards={value!r} must be a pattern like x-{{000000..000003}}.tar, or a list"
        )
        return ()
    expanded: list[str] = []
    for pattern in patterns:
        try:
            expanded += expand_pattern(pattern)
        except ValueError as error:
            problems.append(f"{where}.shards={pattern}: {error}; balance the braces")
    for name in sorted({name for name in expanded if expanded.count(name) > 1}):
        problems.append(f"{where}.shards names {name} twice; every shard counts once")
    return tuple(expanded)


def _check_keys(
    item: Mapping[Any, Any], known: Sequence[str], where: str, problems: list[str]
) -> None:
    for key in item:
        if key not in known:
            hint = _nearest(str(key), known)
            problems.append(f"{where}: unknown key {key!r}{hint}; known: {', '.join(known)}")


def _nearest(word: str, known: Sequence[str]) -> str:
    close = get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
