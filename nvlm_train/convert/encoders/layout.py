"""How the tensors of an encoder lie in files: its own names, or pieces of what others stored."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from nvlm_train.config.model_schema import VisionConfig
from nvlm_train.convert.family import Family
from nvlm_train.convert.headers import Stored
from nvlm_train.geometry import patches_per_side


@dataclass(frozen=True)
class Piece:
    """One tensor of ours inside a stored one: all of it, or `hidden` rows or columns."""

    stored: str
    """Its name in the files, `{n}` for the layer."""
    along: int | None = None
    """The dimension that is cut; None where the whole tensor is ours."""
    block: int = 0
    """The piece begins at this many times `width`: queries, keys and values are blocks 0, 1 and 2."""


@dataclass(frozen=True)
class Layout:
    """One way in which a kind's weights are published."""

    files: Family
    """What config.json says, and the tensors as they are stored. `width` is the width of all heads."""
    pieces: Mapping[str, Piece | tuple[Piece, ...]] = field(default_factory=dict)
    """Our name to where it lies: one piece, or several of equal size whose rows follow each other. A tensor
    that is not listed has our name in the files."""
    fused: str | None = None
    """The fused projection whose rows tell how many dummy heads there are; None: there are none."""

    def places(
        self, name: str, vision: VisionConfig, tensors: Mapping[str, Stored]
    ) -> Sequence[Place]:
        """Finds one of our tensors in the files: equal parts of its rows, in their order."""
        pattern, layer = _pattern(name)
        found = self.pieces.get(pattern, Piece(pattern))
        pieces = (found,) if isinstance(found, Piece) else found
        return [self._place(piece, layer, vision, tensors) for piece in pieces]

    def _place(
        self, piece: Piece, layer: str, vision: VisionConfig, tensors: Mapping[str, Stored]
    ) -> Place:
        stored = piece.stored.replace("{n}", layer)
        if piece.along is None:
            return Place(stored, ())
        sizes = self.files.sizes(vision)
        start = piece.block * sizes["width"]
        whole = (slice(0, size) for size in tensors[stored].shape[: piece.along])
        return Place(stored, (*whole, slice(start, start + sizes["hidden"])))

    def with_dummy_heads(self, vision: VisionConfig, tensors: Mapping[str, Stored]) -> Layout:
        """The layout with as many dummy heads as the files have; itself where they have none.

        Other shapes than those of more heads are left to the check of shapes.
        """
        extra = self._dummy_channels(vision, tensors)
        return replace(self, files=_widened(self.files, extra)) if extra else self

    def _dummy_channels(self, vision: VisionConfig, tensors: Mapping[str, Stored]) -> int:
        """Channels of the heads beyond the recipe's."""
        stored = tensors.get(self.fused.replace("{n}", "0")) if self.fused else None
        if stored is None or not stored.shape or vision.hidden_size % vision.num_heads:
            return 0
        head = vision.hidden_size // vision.num_heads
        extra, rest = divmod(stored.shape[0] - 3 * vision.hidden_size, 3 * head)
        return extra * head if rest == 0 and extra > 0 else 0


@dataclass(frozen=True)
class Place:
    """Where one of our tensors lies in the files, or a part of its rows."""

    stored: str
    index: tuple[slice, ...]
    """As `weight_files.WeightFiles.read` takes it."""


def joined(attention: str, kinds: Sequence[str]) -> dict[str, tuple[Piece, ...]]:
    """Says that files have apart what is one projection here: queries, keys and values.

    >>> list(joined("layer.{n}.attention.", ["bias"]))
    ['layer.{n}.attention.qkv.bias']

    Args:
        attention: what the names of both begin with.
        kinds: weight, or weight and bias.
    """
    return {
        f"{attention}qkv.{kind}": tuple(Piece(f"{attention}{name}_proj.{kind}") for name in "qkv")
        for kind in kinds
    }


def sizes(vision: VisionConfig) -> dict[str, int]:
    """Gives the names of dimensions that encoders share their numbers, for one with a class token."""
    return {
        "layers": vision.num_layers,
        "hidden": vision.hidden_size,
        "width": vision.hidden_size,
        "qkv": 3 * vision.hidden_size,
        "ffn": vision.ffn_hidden_size,
        "patch": vision.patch_size,
        "positions": patches_per_side(vision) ** 2 + 1,
    }


def _widened(files: Family, extra: int) -> Family:
    """The same tensors with `extra` more channels of heads."""

    def wider(vision: VisionConfig) -> Mapping[str, int]:
        width = vision.hidden_size + extra
        return {**files.sizes(vision), "width": width, "qkv": 3 * width}

    return replace(files, sizes=wider)


def _pattern(name: str) -> tuple[str, str]:
    """A name with `{n}` for its layer, and the layer.

    >>> _pattern("encoder.layer.3.mlp.fc1.bias"), _pattern("embeddings.cls_token")
    (('encoder.layer.{n}.mlp.fc1.bias', '3'), ('embeddings.cls_token', ''))
    """
    found = re.search(r"\.(\d+)\.", name)
    if found is None:
        return name, ""
    return f"{name[: found.start()]}.{{n}}.{name[found.end() :]}", found.group(1)
