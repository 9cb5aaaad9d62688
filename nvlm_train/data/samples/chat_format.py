"""Messages as ChatML pieces: which text is tokenised together, where image slots go, what is trained.

The format is Megatron-LM's ChatML, which trained the released model:
`<|im_start|>role\\ncontent<|im_end|>\\n` (see `tokens.TEMPLATES` for what differs between language
models; the `chat()` of the released Hugging Face code writes no newline after `<|im_end|>`). An
assistant's content, its `<|im_end|>` and the newline after it are trained. An image is `<Image>`, for
each tile its tag and its slots, `</Image>`; tags are ordinary text, tokenised with what stands around
them, so `<Image><tile_1>` is one string, as in the released Hugging Face code, unless the recipe has them
separate, as the released training code does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple

from nvlm_train.config.schema import TilingConfig
from nvlm_train.data.samples.messages import Message
from nvlm_train.routes import Route, Routes
from nvlm_train.tiling import ImageLayout
from nvlm_train.tokens import IMAGE_END, IMAGE_MARKER, IMAGE_START, Tokenizer, tile_tags


class Piece(NamedTuple):
    """A run of tokens: `ids` as they are, or else `text` to be tokenised."""

    text: str
    ids: tuple[int, ...]
    role: Literal["context", "trained", "image"]
    span: tuple[int, int] = (0, 0)
    """Which of the sample's cross-routed tiles its tokens may see: [first, last)."""
    after: str = ""
    """Text that stands before `text` in the same run of characters: it decides how that is cut."""


class TaggedTile(NamedTuple):
    """One tile of an image as the text shows it."""

    tag: str
    """The text before the tile, in the decoder's text or in the context; empty without tags."""
    route: Route


@dataclass(frozen=True, slots=True)
class SampleLayout:
    """A sample under one tile limit: its text in pieces and its images in tiles."""

    pieces: list[Piece]
    images: tuple[ImageLayout, ...]
    is_cross: list[bool]
    """For each tile of all images: whether it goes through cross-attention."""
    context_tags: list[str]
    """For each cross-routed tile: the text before its features in the cross-attention's context,
    which is empty where tags stand in the decoder's text."""


class ChatFormat:
    """ChatML with one tokenizer, tag style, number of slots per tile and table of routes.

    A tile tag's tokens see their own tile only; every other token sees the tiles of all images that
    ended before it (NVLM 1.0, section 4.3). Therefore a tag in the decoder's text whose tile is
    cross-routed is tokenised by itself: no token may belong to two tags.
    """

    def __init__(
        self, tokenizer: Tokenizer, tiling: TilingConfig, tokens_per_tile: int, routes: Routes
    ) -> None:
        self._tags = tiling.tags
        self._has_joined_tags = tiling.tag_tokens == "joined"
        self._routes = routes
        self._thumbnail_tag = tokenizer.thumbnail_tag
        self._opening = tokenizer.opening
        self._answer_follows = tokenizer.template.answer_follows
        self._start = (tokenizer.turn_start,)
        self._end = (tokenizer.turn_end,)
        self._slots = (tokenizer.pad,) * tokens_per_tile
        """Slots hold the pad id until tile features replace their embeddings."""
        # Few different layouts of an image occur, and every sample asks for the tiles of some.
        self._known_tiles = lru_cache(maxsize=1024)(self._tagged_tiles)

    def lay_out(self, messages: Sequence[Message], images: Sequence[ImageLayout]) -> SampleLayout:
        """Returns all pieces of a sample; the images stand where the messages have markers."""
        span = (0, 0)
        pieces = [Piece("", self._opening, "context", span)] if self._opening else []
        waiting = iter(images)
        for message in messages:
            pieces.append(Piece("", self._start, "context", span))
            if message.role == "assistant":
                # The header is tokenised apart: generation begins right after it.
                pieces.append(Piece("assistant\n", (), "context", span))
                if message.text:
                    after = self._answer_follows
                    pieces.append(Piece(message.text, (), "trained", span, after))
                pieces += (
                    Piece("", self._end, "trained", span),
                    Piece("\n", (), "trained", span),
                )
            else:
                shown = [next(waiting) for _ in range(message.text.count(IMAGE_MARKER))]
                pieces += self._with_images(f"{message.role}\n{message.text}", shown, span[1])
                span = pieces[-1].span
                pieces += (
                    Piece("", self._end, "context", span),
                    Piece("\n", (), "context", span),
                )
        tiles = [tile for image in images for tile in self.tiles(image)]
        return SampleLayout(
            pieces=pieces,
            images=tuple(images),
            is_cross=[tile.route == "cross" for tile in tiles],
            context_tags=[
                tile.tag if self._routes.tag == "cross" else ""
                for tile in tiles
                if tile.route == "cross"
            ],
        )

    def as_prompt(self, layout: SampleLayout) -> SampleLayout:
        """Returns the sample with nothing trained, ending where the assistant is to speak."""
        span = layout.pieces[-1].span
        header = [
            Piece("", self._start, "context", span),
            Piece("assistant\n", (), "context", span),
        ]
        untrained = [
            piece._replace(role="context") if piece.role == "trained" else piece
            for piece in layout.pieces
        ]
        return replace(layout, pieces=untrained + header)

    def tiles(self, image: ImageLayout) -> tuple[TaggedTile, ...]:
        """Returns the tag and the route of each tile of an image, thumbnail last."""
        return self._known_tiles(image)

    def _tagged_tiles(self, image: ImageLayout) -> tuple[TaggedTile, ...]:
        tags = tile_tags(self._tags, *image, self._thumbnail_tag)
        routes = self._routes.of_image(image.num_regular, image.num_thumbnails)
        return tuple(TaggedTile(tag, route) for tag, route in zip(tags, routes, strict=True))

    def _with_images(self, text: str, images: Sequence[ImageLayout], seen: int) -> list[Piece]:
        """Returns a text whose markers became images; `seen` cross-routed tiles came before.

        Only slots, separate tags and those of cross-routed tiles divide the text. The last piece is text.
        """
        head, *rest = text.split(IMAGE_MARKER)
        pieces: list[Piece] = []
        pending = head
        for image, following in zip(images, rest, strict=True):
            pending += IMAGE_START
            before, num_cross = (0, seen), 0
            for tile in self.tiles(image):
                if tile.route == "decoder":
                    if self._has_joined_tags:
                        pieces += _text(pending + tile.tag, before)
                    else:
                        pieces += _text(pending, before) + _text(tile.tag, before)
                    pieces.append(Piece("", self._slots, "image", before))
                    pending = ""
                    continue
                if self._routes.tag == "decoder":
                    pieces += _text(pending, before)
                    pieces += _text(tile.tag, (seen + num_cross, seen + num_cross + 1))
                    pending = ""
                num_cross += 1
            if num_cross:
                pieces += _text(pending, before)
                pending = ""
            seen += num_cross
            pending += IMAGE_END + following
        return pieces + _text(pending, (0, seen))


def _text(text: str, span: tuple[int, int]) -> list[Piece]:
    """Returns the text as a piece, and nothing for an empty text."""
    return [Piece(text, (), "context", span)] if text else []
