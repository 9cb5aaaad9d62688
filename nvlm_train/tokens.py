"""Text to ids and back: a fast tokenizer whose special tokens cannot be forged by data."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from nvlm_train.config.model_schema import ChatTemplateName, TokenizerConfig
from nvlm_train.config.schema import TileTags
from nvlm_train.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as FastTokenizer

IMAGE_START = "<Image>"
IMAGE_END = "</Image>"
IMAGE_MARKER = "<image>"
"""Placeholder of one image in a conversation's text; `IMAGE_START` and `IMAGE_END` surround its tiles."""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """It says what a language model expects besides `<|im_start|>role\\ncontent<|im_end|>\\n`."""

    bos: str | None
    """Special token that opens a sample; not trained."""
    thumbnail_tag: str
    """Text before the thumbnail's features."""
    answer_follows: str
    """Text that an answer is tokenised behind: SentencePiece vocabularies put a space mark before
    what begins a text, and an answer begins a line, not a text. Empty where both ways agree."""


TEMPLATES: dict[ChatTemplateName, ChatTemplate] = {
    "qwen2": ChatTemplate(None, "<tile_global_thumbnail>", ""),
    "yi": ChatTemplate("<|startoftext|>", "<tile_global>", "assistant\n"),
}
"""`qwen2` is released as `qwen2p0` (NVLM-D 72B), `yi` as `nvlm-yi-34b` (Nous-Hermes-2-Yi-34B), in
Megatron-LM at the tag NVLM-1.0. The header of an assistant's turn, which is not trained, is three
tokens of Qwen2's vocabulary and four of Yi's."""


class Tokenizer:
    """It reads a Hugging Face `tokenizer.json` with the `tokenizers` library.

    Raises:
        ConfigError: the file is missing, or lacks one of the special tokens that the recipe names.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        path = Path(config.path)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise ConfigError(
                [
                    f"model.tokenizer.path={config.path}: no such file; "
                    "give a tokenizer.json or its directory"
                ]
            )
        self.config = config
        self.path = path
        """The tokenizer.json."""
        self._fast = _read(path, config)
        # Text such as "<|im_end|>" inside a sample is data, not a control token.
        self._fast.encode_special_tokens = True
        self._fast.no_truncation()
        self._fast.no_padding()
        problems: list[str] = []
        self.template = TEMPLATES[config.template]
        self.thumbnail_tag = config.thumbnail_tag or self.template.thumbnail_tag
        self.opening = self._opening(problems)
        """Ids that every sample begins with."""
        self.pad = self._special("pad", config.pad, problems)
        self.turn_start = self._special("turn_start", config.turn_start, problems)
        self.turn_end = self._special("turn_end", config.turn_end, problems)
        if problems:
            raise ConfigError(problems)

    def _opening(self, problems: list[str]) -> tuple[int, ...]:
        bos = self.template.bos
        if bos is None:
            return ()
        number = self._fast.token_to_id(bos)
        if number is None:
            problems.append(
                f"model.tokenizer.template={self.config.template} begins samples with {bos}, which "
                f"is not in the vocabulary of {self.config.path}; use that model's own tokenizer"
            )
            return ()
        return (int(number),)

    def encode_after(self, before: str, text: str) -> list[int]:
        """Returns ids of `text` as they are behind `before`, or by itself where a token would span both."""
        joined, head = self.encode(before + text), self.encode(before)
        return joined[len(head) :] if joined[: len(head)] == head else self.encode(text)

    def _special(self, field: str, token: str, problems: list[str]) -> int:
        number = self._fast.token_to_id(token)
        if number is None:
            problems.append(
                f"model.tokenizer.{field}={token} is not in the vocabulary of {self.config.path}; "
                "name a special token that the tokenizer has"
            )
            return -1
        return int(number)

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Returns every token, added ones included, and its id."""
        return dict(self._fast.get_vocab(with_added_tokens=True))

    @property
    def vocab_size(self) -> int:
        """An embedding table needs this number of rows: the largest id and one.

        Ids may have gaps, so that it can be more than the number of tokens.
        """
        return max(self.vocabulary.values()) + 1

    @property
    def control_tokens(self) -> dict[str, int]:
        """Returns the tokens that the chat template writes, by name, and their ids."""
        names = (self.config.pad, self.config.turn_start, self.config.turn_end)
        opening = () if self.template.bos is None else (self.template.bos,)
        ids = (self.pad, self.turn_start, self.turn_end, *self.opening)
        return dict(zip((*names, *opening), ids, strict=True))

    def encode(self, text: str) -> list[int]:
        """Returns the ids of plain text, never a special token."""
        return list(self._fast.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encodes many texts at once, in parallel threads."""
        encodings = self._fast.encode_batch_fast(list(texts), add_special_tokens=False)
        return [list(encoding.ids) for encoding in encodings]

    @property
    def digest(self) -> str:
        """It is the SHA-256 of the tokenizer file: equal digests make equal ids."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    def decode(self, ids: list[int]) -> str:
        """Returns the text of ids; special tokens are left out."""
        return str(self._fast.decode(ids, skip_special_tokens=True))


def _read(path: Path, config: TokenizerConfig) -> FastTokenizer:
    from tokenizers import Tokenizer as FastTokenizer

    try:
        return FastTokenizer.from_file(str(path))
    # The library knows no narrower class for a file that is no tokenizer.
    except Exception as problem:
        raise ConfigError(
            [
                f"model.tokenizer.path={config.path} cannot be read ({problem}); "
                "give a whole tokenizer.json"
            ]
        ) from problem


def tile_tags(
    style: TileTags, grid: tuple[int, int], num_regular: int, num_thumbnails: int, thumbnail: str
) -> list[str]:
    """Writes the text before each tile of an image (NVLM 1.0, section 4.2, Table 1): T = regular + thumbnail.

    Regular tiles have regular tags; the thumbnail's tag stands only before a thumbnail. (Megatron-LM
    gives it to the last tile whatever that is: its tags have always been used with thumbnails.)

    Args:
        style: `1d` counts tiles, `2d_grid` names column and row, `2d_bbox` says where the tile lies
            in the image: left, top, right, bottom in thousandths of its width and height.
        grid: (columns, rows) of the image, numbered row by row.
        num_regular: tiles of the grid; 0 where the only tile is the thumbnail.
        num_thumbnails: 0 or 1; the thumbnail is last.
        thumbnail: the thumbnail's tag, the same in every style.

    >>> tile_tags("1d", (2, 1), 2, 1, "<tile_global_thumbnail>")
    ['<tile_1>', '<tile_2>', '<tile_global_thumbnail>']
    >>> tile_tags("1d", (2, 1), 2, 0, "<tile_global_thumbnail>")
    ['<tile_1>', '<tile_2>']
    >>> tile_tags("1d", (1, 1), 0, 1, "<thumbnail>"), tile_tags("1d", (1, 1), 1, 0, "<thumbnail>")
    (['<thumbnail>'], ['<tile_1>'])
    >>> tile_tags("2d_grid", (1, 2), 2, 1, "<thumbnail>")
    ['<tile_x0_y0>', '<tile_x0_y1>', '<thumbnail>']
    >>> tile_tags("2d_bbox", (3, 1), 3, 1, "<thumbnail>")[1]
    '<box>(333,0),(667,1000)</box>'
    >>> tile_tags("none", (1, 1), 0, 1, "<thumbnail>")
    ['']
    """
    if style == "none":
        return [""] * (num_regular + num_thumbnails)
    columns = grid[0]
    places = [(number % columns, number // columns) for number in range(num_regular)]
    if style == "1d":
        regular = [f"<tile_{number}>" for number in range(1, num_regular + 1)]
    elif style == "2d_grid":
        regular = [f"<tile_x{x}_y{y}>" for x, y in places]
    else:
        regular = [_box(x, y, grid) for x, y in places]
    return regular + [thumbnail] * num_thumbnails


def _box(x: int, y: int, grid: tuple[int, int]) -> str:
    left, right = (round(1000 * edge / grid[0]) for edge in (x, x + 1))
    top, bottom = (round(1000 * edge / grid[1]) for edge in (y, y + 1))
    return f"<box>({left},{top}),({right},{bottom})</box>"
