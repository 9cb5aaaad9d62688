"""Field mappings: how a tar that somebody else made is read as it is.

A data recipe names, for each field of our record, where its value lies in such a tar:

    fields: {caption: txt}                                    # KEY.txt is the caption
    fields: {conversations: json.dialog, image: jpg}          # a field of KEY.json, only KEY.jpg
    fields: {question: "=Which digit is this?", answer: cls}  # the same text for every sample

The index of a tar depends on its mapping, so each mapping has its own (`FieldMapping.digest` is part of
the file's name and of the index digest), and the lengths that follow from it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from nvlm_train.data.shards.tar import IMAGE_SUFFIX

KINDS = (
    ("conversations",),
    ("messages",),
    ("caption",),
    ("text",),
    ("question", "answer"),
    ("question", "answers"),
    ("question", "choices", "answer"),
)
"""Which fields make a record together; `task` may come with any of them."""

_TEXTS = ("caption", "text", "question", "answer")
_FORMS = ", ".join("+".join(kind) for kind in KINDS)


@dataclass(frozen=True)
class FieldMapping:
    """Says where the fields of a record come from. The empty mapping reads our own tars."""

    sources: tuple[tuple[str, str], ...] = ()
    """(field, place): `txt` is the text of KEY.txt, `json.a.b` a field of KEY.json, `=x` the
    text x. Without any, KEY.json is the record."""
    images: tuple[str, ...] = ()
    """Suffixes of the image members, in order; `jpg` also stands for `0.jpg`, `1.jpg`, ....
    Without any, every image beside the record is one of the sample's."""

    @cached_property
    def members(self) -> tuple[str, ...]:
        """The suffixes of the members that are read for a record."""
        named = (_split(place)[0] for _, place in self.sources if not place.startswith("="))
        return tuple(dict.fromkeys(named)) or ("json",)

    @cached_property
    def digest(self) -> str:
        """A digest that tells mappings apart: 16 hex digits, or nothing for the empty one."""
        if not self.sources and not self.images:
            return ""
        content = json.dumps([self.sources, self.images]).encode()
        return hashlib.sha256(content).hexdigest()[:16]

    def image_number(self, suffix: str) -> int | None:
        """Returns the place of an image member among its sample's images; None for other members.

        >>> FieldMapping().image_number("2.jpg"), FieldMapping(images=("png",)).image_number("jpg")
        (2, None)
        """
        if not self.images:
            match = IMAGE_SUFFIX.fullmatch(suffix)
            return int(match[1] or 0) if match else None
        first, _, rest = suffix.partition(".")
        numbered = rest in self.images and first.isdigit()
        named = rest if numbered else suffix
        if named not in self.images:
            return None
        # Ten million images of one suffix come before the next suffix's first.
        return self.images.index(named) * 10_000_000 + (int(first) if numbered else 0)

    def record(self, contents: Sequence[bytes]) -> bytes:
        """Makes a record's JSON from the contents of `members`, in their order.

        Raises:
            ValueError: "record cannot be read: ...".
        """
        if not self.sources:
            return contents[0]
        values = {
            member: _parsed(member, content)
            for member, content in zip(self.members, contents, strict=True)
        }
        return json.dumps(self.select(values), ensure_ascii=True).encode()

    def select(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Makes the record out of parsed members (or columns of a table), given by name.

        Raises:
            ValueError: a place that does not exist there.
        """
        record = {field: _value(field, place, values) for field, place in self.sources}
        # With choices an answer may be the number of one; elsewhere a number is what is said.
        texts = [name for name in _TEXTS if name != "answer" or "choices" not in record]
        return {
            field: str(value) if field in texts and _is_number(value) else value
            for field, value in record.items()
        }


OWN_FIELDS = FieldMapping()
"""The mapping of the shards that `nvlm data prepare` writes."""


def read_fields(value: object, where: str, problems: list[str]) -> FieldMapping:
    """Reads the mapping of a data recipe or command line; adds what is wrong to `problems`."""
    if value is None:
        return FieldMapping()
    if not isinstance(value, dict) or not value:
        problems.append(f"{where}={value!r} must map fields to places, as in {{caption: txt}}")
        return FieldMapping()
    sources = tuple((str(field), place) for field, place in value.items() if field != "image")
    for field, place in sources:
        if not isinstance(place, str) or not place.strip("="):
            problems.append(
                f"{where}.{field}={place!r} must be a place: a member like txt, "
                "a field like json.caption, or =some text"
            )
    named = [field for field, _ in sources if field != "task"]
    if named and not any(sorted(named) == sorted(kind) for kind in KINDS):
        problems.append(
            f"{where} maps {', '.join(named)}; a record is one of {_FORMS}; map exactly these"
        )
    images = value.get("image", [])
    suffixes = [images] if isinstance(images, str) else images
    if not isinstance(suffixes, list) or not all(isinstance(s, str) and s for s in suffixes):
        problems.append(f"{where}.image={images!r} must be a member's suffix like jpg, or a list")
        suffixes = []
    return FieldMapping(sources, tuple(suffixes))


def _split(place: str) -> tuple[str, tuple[str, ...]]:
    """Returns member and path inside its JSON: `meta.json.a.b` is field a.b of KEY.meta.json."""
    parts = place.split(".")
    if "json" not in parts:
        return place.lower(), ()
    end = parts.index("json") + 1
    return ".".join(parts[:end]).lower(), tuple(parts[end:])


def _parsed(member: str, content: bytes) -> Any:
    try:
        text = content.decode()
        return json.loads(text) if member.endswith("json") else text.strip()
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"record cannot be read: KEY.{member} is not what its name says ({error})"
        ) from error


def _value(field: str, place: str, values: Mapping[str, Any]) -> Any:
    if place.startswith("="):
        return place[1:]
    if place in values:
        value: Any = values[place]
    else:
        member, path = _split(place)
        if member not in values:
            member, *rest = place.split(".")
            path = tuple(rest)
        value = values.get(member)
        for name in path:
            if isinstance(value, list) and name.isdigit() and int(name) < len(value):
                value = value[int(name)]
            else:
                value = value.get(name) if isinstance(value, dict) else None
    if value is None:
        raise ValueError(
            f"record cannot be read: {place}, which is to be its {field}, is missing or null"
        )
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
