"""Turns as ChatML pieces: which text is tokenised together, where image slots go, what is trained.

The released format is Qwen2's ChatML, `<|im_start|>role\\ncontent<|im_end|>\\n`. Trained are an
assistant's content, its `<|im_end|>` and the newline after it. An image is `<Image>`, for each tile
its tag and its slots, `</Image>`; tags are ordinary text, tokenised with what stands around them,
so `<Image><tile_1>` is one string, as in the released Hugging Face code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from nvlm_train.config.schema import TileTags
from nvlm_train.data.records import Turn
from nvlm_train.tokens import IMAGE_END, IMAGE_MARKER, IMAGE_START, Tokenizer, tile_tags


class Piece(NamedTuple):
    """A run of tokens: `ids` as they are, or else `text` to be tokenised."""

    text: str
    ids: tuple[int, ...]
    role: Literal["context", "trained", "image"]


class ChatFormat:
    """ChatML with one tokenizer, tag style and number of slots per tile."""

    def __init__(self, tokenizer: Tokenizer, tags: TileTags, tokens_per_tile: int) -> None:
        self._tags = tags
        self._thumbnail_tag = tokenizer.config.thumbnail_tag
        self._start = (tokenizer.turn_start,)
        self._end = (tokenizer.turn_end,)
        # Slots hold the pad id until tile features replace their embeddings.
        self._slots = Piece("", (tokenizer.pad,) * tokens_per_tile, "image")

    def conversation(self, turns: Sequence[Turn], tiles_per_image: Sequence[int]) -> list[Piece]:
        """All pieces of a sample; `tiles_per_image` counts thumbnails and follows the markers."""
        pieces: list[Piece] = []
        images = iter(tiles_per_image)
        for turn in turns:
            pieces.append(Piece("", self._start, "context"))
            if turn.role == "assistant":
                # The header is tokenised apart: generation begins right after it.
                pieces.append(Piece("assistant\n", (), "context"))
                if turn.text:
                    pieces.append(Piece(turn.text, (), "trained"))
                pieces += (Piece("", self._end, "trained"), Piece("\n", (), "trained"))
            else:
                shown = [next(images) for _ in range(turn.text.count(IMAGE_MARKER))]
                pieces += self._with_images(f"{turn.role}\n{turn.text}", shown)
                pieces += (Piece("", self._end, "context"), Piece("\n", (), "context"))
        return pieces

    def prompt(self, turns: Sequence[Turn], tiles_per_image: Sequence[int]) -> list[Piece]:
        """The same, nothing trained, ending where the assistant is to speak."""
        pieces = self.conversation(turns, tiles_per_image)
        header = [Piece("", self._start, "context"), Piece("assistant\n", (), "context")]
        untrained = [
            piece._replace(role="context") if piece.role == "trained" else piece for piece in pieces
        ]
        return untrained + header

    def _with_images(self, text: str, tiles_per_image: Sequence[int]) -> list[Piece]:
        """Text whose markers became images; only slots divide it."""
        head, *rest = text.split(IMAGE_MARKER)
        pieces: list[Piece] = []
        pending = head
        for num_tiles, following in zip(tiles_per_image, rest, strict=True):
            pending += IMAGE_START
            for tag in tile_tags(self._tags, num_tiles, self._thumbnail_tag):
                pending += tag
                if pending:
                    pieces.append(Piece(pending, (), "context"))
                pieces.append(self._slots)
                pending = ""
            pending = IMAGE_END + following
        if pending:
            pieces.append(Piece(pending, (), "context"))
        return pieces
