"""Messages as ChatML pieces: which text is tokenised together, where image slots go, what is trained.

The format is Megatron-LM's ChatML, which trained the released model:
`<|im_start|>role\\ncontent<|im_end|>\\n` (see `tokens.TEMPLATES` for what differs between language
models; the `chat()` of the released Hugging Face code writes no newline after `<|im_end|>`). Trained
are an assistant's content, its `<|im_end|>` and the newline after it. An image is `<Image>`, for each
tile its tag and its slots, `</Image>`; tags are ordinary text, tokenised with what stands around
them, so `<Image><tile_1>` is one string, as in the released Hugging Face code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from nvlm_train.config.schema import TileTags
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


class ChatFormat:
    """ChatML with one tokenizer, tag style, number of slots per tile and table of routes.

    A tile tag's tokens see their own tile only; every other token sees the tiles of all images that
    ended before it (NVLM 1.0, section 4.3). Therefore a tag in the decoder's text whose tile is
    cross-routed is tokenised by itself: no token may belong to two tags.
    """

    def __init__(
        self, tokenizer: Tokenizer, tags: TileTags, tokens_per_tile: int, routes: Routes
    ) -> None:
        self._tags = tags
        self._routes = routes
        self._thumbnail_tag = tokenizer.thumbnail_tag
        self._opening = tokenizer.opening
        self._answer_follows = tokenizer.template.answer_follows
        self._start = (tokenizer.turn_start,)
        self._end = (tokenizer.turn_end,)
        self._slots = (tokenizer.pad,) * tokens_per_tile
        """Slots hold the pad id until tile features replace their embeddings."""

    def conversation(
        self, messages: Sequence[Message], images: Sequence[ImageLayout]
    ) -> list[Piece]:
        """All pieces of a sample; the images follow the markers."""
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
        return pieces

    def tags(self, image: ImageLayout) -> list[str]:
        """Text before each tile of an image, in the decoder's text or in the context."""
        return tile_tags(self._tags, *image, self._thumbnail_tag)

    def routes(self, image: ImageLayout) -> list[Route]:
        """Which way each tile of an image takes."""
        return self._routes.of_image(image.num_regular, image.num_thumbnails)

    def context_tags(self, images: Sequence[ImageLayout]) -> list[str]:
        """Text before each cross-routed tile's features in the cross-attention's context."""
        tags: list[str] = []
        for image in images:
            tags += [
                tag if self._routes.tag == "cross" else ""
                for tag, route in zip(self.tags(image), self.routes(image), strict=True)
                if route == "cross"
            ]
        return tags

    def prompt(self, messages: Sequence[Message], images: Sequence[ImageLayout]) -> list[Piece]:
        """The same, nothing trained, ending where the assistant is to speak."""
        pieces = self.conversation(messages, images)
        span = pieces[-1].span
        header = [
            Piece("", self._start, "context", span),
            Piece("assistant\n", (), "context", span),
        ]
        untrained = [
            piece._replace(role="context") if piece.role == "trained" else piece for piece in pieces
        ]
        return untrained + header

    def _with_images(self, text: str, images: Sequence[ImageLayout], seen: int) -> list[Piece]:
        """Text whose markers became images; `seen` cross-routed tiles came before.

        Only slots, and tags of cross-routed tiles, divide the text. The last piece is text.
        """
        head, *rest = text.split(IMAGE_MARKER)
        pieces: list[Piece] = []
        pending = head
        for image, following in zip(images, rest, strict=True):
            pending += IMAGE_START
            before, num_cross = (0, seen), 0
            for tag, route in zip(self.tags(image), self.routes(image), strict=True):
                if route == "decoder":
                    pieces += _text(pending + tag, before)
                    pieces.append(Piece("", self._slots, "image", before))
                    pending = ""
                    continue
                if self._routes.tag == "decoder":
                    pieces += _text(pending, before)
                    pieces += _text(tag, (seen + num_cross, seen + num_cross + 1))
                    pending = ""
                num_cross += 1
            if num_cross:
                pieces += _text(pending, before)
                pending = ""
            seen += num_cross
            pending += IMAGE_END + following
        return pieces + _text(pending, (0, seen))


def _text(text: str, span: tuple[int, int]) -> list[Piece]:
    return [Piece(text, (), "context", span)] if text else []
