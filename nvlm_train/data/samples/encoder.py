"""One sample's token ids, image slots and labels; fewer tiles when it would not fit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np

from nvlm_train.config.schema import TilingConfig
from nvlm_train.data.images import check_pixels
from nvlm_train.data.samples.chat_format import ChatFormat, Piece
from nvlm_train.data.samples.encoded import CrossTiles, EncodedSample
from nvlm_train.data.samples.messages import Message, place_images
from nvlm_train.data.samples.prompts import PromptFamily, load_prompts
from nvlm_train.data.samples.records import read_messages
from nvlm_train.routes import Routes
from nvlm_train.tiling import ImageLayout, choose_grid, lay_out, tile_limits
from nvlm_train.tokens import Tokenizer

ENCODING_VERSION = 4
"""Raised whenever the same record would become other tokens; stored lengths are then made anew."""

_SHORT_TEXT = 48
"""Characters of the texts worth remembering: headers, tags, newlines, common prompts."""

ImageSize = tuple[int, int]
"""(width, height), upright."""


@dataclass(frozen=True)
class EncodingSpec:
    """Everything besides the tokenizer that decides how a sample is encoded."""

    tile_size: int
    tokens_per_tile: int
    context_tokens_per_tile: int
    """Tokens of a tile in the cross-attention context: a resampler leaves fewer."""
    routes: Routes
    tiling: TilingConfig
    sequence_length: int
    prompts: PromptFamily
    system_message: str | None
    max_image_pixels: int


@dataclass(frozen=True, slots=True)
class SampleLayout:
    """A sample's pieces under one tile limit."""

    pieces: list[Piece]
    images: tuple[ImageLayout, ...]


class SampleEncoder:
    """Records into token ids, the same for the same record, key and image sizes. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer, spec: EncodingSpec) -> None:
        self.tokenizer = tokenizer
        self.spec = spec
        self.format = ChatFormat(tokenizer, spec.tiling.tags, spec.tokens_per_tile, spec.routes)
        self._remembered = lru_cache(maxsize=4096)(tokenizer.encode)
        self._remembered_after = lru_cache(maxsize=4096)(tokenizer.encode_after)

    @property
    def fingerprint(self) -> str:
        """Equal fingerprints make equal encodings, and leave out the same samples."""
        return _hash([self.tokens_fingerprint, self.spec.max_image_pixels])

    @property
    def tokens_fingerprint(self) -> str:
        """Equal ones make the same tokens of a sample that can be used: hash of tokenizer, settings,
        prompts and `ENCODING_VERSION`."""
        config, spec = asdict(self.tokenizer.config), asdict(self.spec)
        del config["path"], spec["max_image_pixels"]
        return _hash([ENCODING_VERSION, self.tokenizer.digest, config, spec, load_prompts()])

    def messages(self, key: str, record: bytes, sizes: Sequence[ImageSize]) -> tuple[Message, ...]:
        """The record's messages, with the stage's system message unless it brings its own.

        Raises:
            ValueError: the record or its images cannot be used; the text before ":" names the kind.
        """
        for width, height in sizes:
            check_pixels(width, height, self.spec.max_image_pixels)
        return self._with_system(read_messages(record, key, len(sizes), self.spec.prompts))

    def layout(
        self, messages: Sequence[Message], sizes: Sequence[ImageSize], max_tiles: int
    ) -> SampleLayout:
        """Pieces and tiles when no image may have more than `max_tiles` regular tiles."""
        images = self._images(sizes, max_tiles)
        return SampleLayout(self.format.conversation(messages, images), images)

    def ids(self, piece: Piece, known: Mapping[str, Sequence[int]] | None = None) -> Sequence[int]:
        """Token ids of a piece; `known` holds texts that were tokenised before."""
        if not piece.text:
            return piece.ids
        if piece.after:
            short = len(piece.text) <= _SHORT_TEXT
            encode = self._remembered_after if short else self.tokenizer.encode_after
            return encode(piece.after, piece.text)
        if known is not None and piece.text in known:
            return known[piece.text]
        if len(piece.text) <= _SHORT_TEXT:
            return self._remembered(piece.text)
        return self.tokenizer.encode(piece.text)

    def encode(self, key: str, record: bytes, sizes: Sequence[ImageSize]) -> EncodedSample:
        """The sample with as many tiles as fit, cut at `sequence_length` when one each is too many.

        Raises:
            ValueError: unusable; see `messages`, and "every label is masked", "images do not fit".
        """
        messages = self.messages(key, record, sizes)
        encoded = None
        for limit in tile_limits(self.spec.tiling.max_tiles if sizes else 1):
            encoded = self._assemble(self.layout(messages, sizes, limit))
            if len(encoded.token_ids) <= self.spec.sequence_length:
                break
        assert encoded is not None, "tile_limits is never empty"
        return self.check_labels(encoded.truncated(self.spec.sequence_length))

    def encode_prompt(
        self, messages: Sequence[Message], sizes: Sequence[ImageSize], room: int = 0
    ) -> EncodedSample:
        """A question to answer: like `encode`, ending with the assistant's header, without labels.

        `room` tokens of the sequence length are kept free for the answer.

        Raises:
            ValueError: markers that do not match the images, or a prompt that does not fit.
        """
        shown = self._with_system(place_images(tuple(messages), len(sizes)))
        length = 0
        for limit in tile_limits(self.spec.tiling.max_tiles if sizes else 1):
            images = self._images(sizes, limit)
            encoded = self._assemble(SampleLayout(self.format.prompt(shown, images), images))
            length = len(encoded.token_ids)
            if length + room <= self.spec.sequence_length:
                return encoded
        raise ValueError(
            f"prompt is too long: {length} tokens and {room} for the answer do not fit "
            f"sequence_length={self.spec.sequence_length}"
        )

    def check_labels(self, encoded: EncodedSample) -> EncodedSample:
        """The sample itself.

        Raises:
            ValueError: nothing in it is trained.
        """
        if len(encoded.label_ids) == 0:
            why = (
                f"the answer lies behind sequence_length={self.spec.sequence_length}; "
                "raise it or shorten the prompt"
                if encoded.is_truncated
                else "the conversation has no assistant turn"
            )
            raise ValueError(f"every label is masked: {why}")
        return encoded

    def _with_system(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        if self.spec.system_message is None or messages[0].role == "system":
            return messages
        return (Message("system", self.spec.system_message), *messages)

    def _images(self, sizes: Sequence[ImageSize], max_tiles: int) -> tuple[ImageLayout, ...]:
        thumbnails = int(self.spec.tiling.thumbnail)
        grids = [choose_grid(*size, self.spec.tile_size, max_tiles) for size in sizes]
        return tuple(lay_out(grid, thumbnails) for grid in grids)

    def _assemble(self, layout: SampleLayout) -> EncodedSample:
        ids: list[int] = []
        images: list[int] = []
        labels: list[int] = []
        spans: list[tuple[int, int, int, int]] = []
        for piece in layout.pieces:
            start = len(ids)
            ids.extend(self.ids(piece))
            if piece.span[0] < piece.span[1]:
                spans.append((start, len(ids), *piece.span))
            if piece.role == "image":
                images.extend(range(start, len(ids)))
            elif piece.role == "trained":
                labels.extend(range(start - 1, len(ids) - 1))
        token_ids = np.array(ids, dtype=np.int64)
        label_positions = np.array(labels, dtype=np.int64)
        return EncodedSample(
            token_ids=token_ids,
            image_positions=np.array(images, dtype=np.int64),
            label_positions=label_positions,
            label_ids=token_ids[label_positions + 1],
            images=layout.images,
            cross=self._cross(layout.images, spans),
            is_truncated=False,
        )

    def _cross(
        self, images: Sequence[ImageLayout], spans: Sequence[tuple[int, int, int, int]]
    ) -> CrossTiles:
        routes = [route for image in images for route in self.format.routes(image)]
        tags = [
            np.array(self._remembered(tag) if tag else [], dtype=np.int64)
            for tag in self.format.context_tags(images)
        ]
        return CrossTiles(
            self.spec.context_tokens_per_tile,
            np.array([route == "cross" for route in routes], dtype=np.bool_),
            tuple(tags),
            np.array(_merged(spans), dtype=np.int64).reshape(-1, 4),
        )


def _hash(parts: list[object]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _merged(spans: Sequence[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    """Neighbouring tokens that see the same tiles make one span."""
    merged: list[tuple[int, int, int, int]] = []
    for start, stop, first, last in spans:
        if merged and merged[-1][1:] == (start, first, last):
            merged[-1] = (merged[-1][0], stop, first, last)
        else:
            merged.append((start, stop, first, last))
    return merged
