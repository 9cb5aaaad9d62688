"""One sample's token ids, image slots and labels; fewer tiles when it would not fit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np

from nvlm_train.config.schema import TilingConfig
from nvlm_train.data.images import check_pixels
from nvlm_train.data.samples.chat_format import ChatFormat, Piece, SampleLayout
from nvlm_train.data.samples.encoded import CrossTiles, EncodedSample
from nvlm_train.data.samples.messages import Message, place_images
from nvlm_train.data.samples.prompts import PromptFamily, load_prompts
from nvlm_train.data.samples.records import ImageSize, RawSample, read_messages
from nvlm_train.routes import Routes
from nvlm_train.tiling import choose_grid, lay_out, tile_limits
from nvlm_train.tokens import Tokenizer

ENCODING_VERSION = 4
"""Raised whenever the same record would become other tokens; stored lengths are then made again."""

_SHORT_TEXT = 48
"""Characters of the texts worth remembering: headers, tags, newlines, common prompts."""


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
class SampleLength:
    """How much of a pack a sample takes."""

    num_tokens: int = 0
    """Image tokens are included."""
    num_tiles: int = 0
    """Thumbnails are included."""
    num_trained: int = 0
    """Labels; 0 exactly for a sample that cannot be used."""
    is_truncated: bool = False
    """Whether the sample is cut at `sequence_length`."""
    problem: str | None = None
    """The reason why the sample cannot be used; the text before ":" is its kind."""


@dataclass(frozen=True, slots=True)
class _Draft:
    """A sample whose tokens are still to be counted."""

    row: int
    messages: tuple[Message, ...]
    sizes: Sequence[ImageSize]
    layout: SampleLayout
    """The sample at the full tile limit."""


class SampleEncoder:
    """Turns records into token ids, the same for the same record, key and image sizes.
    Thread-safe."""

    def __init__(self, tokenizer: Tokenizer, spec: EncodingSpec) -> None:
        self.tokenizer = tokenizer
        self.spec = spec
        self.format = ChatFormat(tokenizer, spec.tiling, spec.tokens_per_tile, spec.routes)
        self._remembered = lru_cache(maxsize=4096)(tokenizer.encode)
        self._remembered_after = lru_cache(maxsize=4096)(tokenizer.encode_after)

    @property
    def fingerprint(self) -> str:
        """Equal fingerprints make equal encodings, and leave out the same samples."""
        return _hash([self.tokens_fingerprint, self.spec.max_image_pixels])

    @property
    def tokens_fingerprint(self) -> str:
        """Equal ones make the same tokens of a sample that can be used.

        This is a hash of tokenizer, settings, prompts and `ENCODING_VERSION`.
        """
        config, spec = asdict(self.tokenizer.config), asdict(self.spec)
        del config["path"], spec["max_image_pixels"]
        return _hash([ENCODING_VERSION, self.tokenizer.digest, config, spec, load_prompts()])

    def messages(self, key: str, record: bytes, sizes: Sequence[ImageSize]) -> tuple[Message, ...]:
        """Returns the record's messages, with the stage's system message unless it brings its own.

        Raises:
            ValueError: the record or its images cannot be used; the text before ":" names the kind.
        """
        for width, height in sizes:
            check_pixels(width, height, self.spec.max_image_pixels)
        messages = read_messages(record, key, len(sizes), self.spec.prompts)
        return self._with_system(messages)

    def layouts(
        self, messages: Sequence[Message], sizes: Sequence[ImageSize]
    ) -> Iterator[SampleLayout]:
        """Yields the sample at `tiling.max_tiles` tiles an image, then at ever fewer of them."""
        tiling, tile_size = self.spec.tiling, self.spec.tile_size
        for max_tiles in tile_limits(tiling.max_tiles if sizes else 1):
            grids = [choose_grid(*size, tile_size, max_tiles) for size in sizes]
            images = [lay_out(grid, int(tiling.thumbnail)) for grid in grids]
            yield self.format.lay_out(messages, images)

    def ids(self, piece: Piece, known: Mapping[str, Sequence[int]] | None = None) -> Sequence[int]:
        """Returns the token ids of a piece; `known` holds texts that were tokenised before."""
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
        """Returns the sample with as many tiles as fit.

        Where one tile an image is still too much, the sample is cut at `sequence_length`.

        Raises:
            ValueError: the sample cannot be used; see `messages`, and "every label is masked",
                "images do not fit".
        """
        return self._encode(self.messages(key, record, sizes), sizes)

    def encode_prompt(
        self, messages: Sequence[Message], sizes: Sequence[ImageSize], room: int = 0
    ) -> EncodedSample:
        """Returns a question to answer: it ends with the assistant's header and has no labels.

        Args:
            messages: the question, with what was said before.
            sizes: (width, height) of the images.
            room: tokens of the sequence length that are kept free for the answer.

        Raises:
            ValueError: markers that do not match the images, or a prompt that does not fit.
        """
        shown = self._with_system(place_images(tuple(messages), len(sizes)))
        length = 0
        for layout in self.layouts(shown, sizes):
            encoded = self._assemble(self.format.as_prompt(layout))
            length = len(encoded.token_ids)
            if length + room <= self.spec.sequence_length:
                return encoded
        raise ValueError(
            f"prompt is too long: {length} tokens and {room} for the answer do not fit "
            f"sequence_length={self.spec.sequence_length}"
        )

    def measure(
        self, rows: Iterable[int], read: Callable[[int], RawSample]
    ) -> Iterator[tuple[int, SampleLength]]:
        """Yields the row and the length of every sample, those that cannot be read first.

        The lengths are those of `encode`, which costs several times as much: here the samples are
        tokenised together and no arrays are made.

        Args:
            rows: numbers of the samples.
            read: reads the sample of a row; its ValueError is the sample's problem.
        """
        drafts: list[_Draft] = []
        for row in rows:
            try:
                sample = read(row)
                messages = self.messages(sample.key, sample.record, sample.sizes)
            except ValueError as error:
                yield row, SampleLength(problem=str(error))
                continue
            layout = next(self.layouts(messages, sample.sizes))
            drafts.append(_Draft(row, messages, sample.sizes, layout))
        known = self._tokenise(drafts)
        for draft in drafts:
            yield draft.row, self._length(draft, known)

    def _tokenise(self, drafts: Sequence[_Draft]) -> dict[str, list[int]]:
        """Returns the ids of every different text of these samples."""
        texts = list(
            {
                piece.text: None
                for draft in drafts
                for piece in draft.layout.pieces
                if piece.text and not piece.after
            }
        )
        return dict(zip(texts, self.tokenizer.encode_batch(texts), strict=True))

    def _length(self, draft: _Draft, known: Mapping[str, Sequence[int]]) -> SampleLength:
        """Counts a sample's tokens; only one that does not fit is encoded, with fewer tiles."""
        counts = [(len(self.ids(piece, known)), piece.role) for piece in draft.layout.pieces]
        num_tokens = sum(count for count, _ in counts)
        num_trained = sum(count for count, role in counts if role == "trained")
        if num_tokens <= self.spec.sequence_length and num_trained > 0:
            num_tiles = sum(image.num_tiles for image in draft.layout.images)
            return SampleLength(num_tokens, num_tiles, num_trained)
        try:
            encoded = self._encode(draft.messages, draft.sizes)
        except ValueError as error:
            return SampleLength(problem=str(error))
        return SampleLength(
            num_tokens=len(encoded.token_ids),
            num_tiles=encoded.num_tiles,
            num_trained=len(encoded.label_ids),
            is_truncated=encoded.is_truncated,
        )

    def _encode(self, messages: Sequence[Message], sizes: Sequence[ImageSize]) -> EncodedSample:
        encoded = None
        for layout in self.layouts(messages, sizes):
            encoded = self._assemble(layout)
            if len(encoded.token_ids) <= self.spec.sequence_length:
                break
        assert encoded is not None, "tile_limits is never empty"
        return self._check_labels(encoded.truncated(self.spec.sequence_length))

    def _check_labels(self, encoded: EncodedSample) -> EncodedSample:
        """Returns the sample itself. Raises ValueError: nothing in it is trained."""
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
            cross=self._cross(layout, spans),
            is_truncated=False,
        )

    def _cross(
        self, layout: SampleLayout, spans: Sequence[tuple[int, int, int, int]]
    ) -> CrossTiles:
        tags = [
            np.array(self._remembered(tag) if tag else [], dtype=np.int64)
            for tag in layout.context_tags
        ]
        return CrossTiles(
            self.spec.context_tokens_per_tile,
            np.array(layout.is_cross, dtype=np.bool_),
            tuple(tags),
            np.array(_merged(spans), dtype=np.int64).reshape(-1, 4),
        )


def _hash(parts: list[object]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _merged(spans: Sequence[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    """Returns the spans with neighbouring tokens that see the same tiles made one."""
    merged: list[tuple[int, int, int, int]] = []
    for start, stop, first, last in spans:
        if merged and merged[-1][1:] == (start, first, last):
            merged[-1] = (merged[-1][0], stop, first, last)
        else:
            merged.append((start, stop, first, last))
    return merged
