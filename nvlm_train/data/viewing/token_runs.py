"""A sample's tokens as text, in runs that share a role and a span. Shape legend: N tokens, T tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import numpy as np

from nvlm_train.data.samples.encoded import EncodedSample
from nvlm_train.tokens import Tokenizer

Role = Literal["context", "trained", "image"]

_MAX_BYTES_OF_A_CHARACTER = 4
_BROKEN = "\ufffd"


@dataclass(frozen=True, slots=True)
class Token:
    """One token as a reader sees it."""

    position: int
    """The token's position in the sample."""
    number: int
    """The token's id."""
    text: str
    """Empty where the character goes on in the next token."""
    is_special: bool


@dataclass(frozen=True, slots=True)
class TokenRun:
    """Neighbouring tokens of one role that see the same tiles through cross-attention."""

    role: Role
    tokens: tuple[Token, ...]
    tile: int | None
    """For image slots: which of the sample's tiles stands in them."""
    span: tuple[int, int]
    """[first, last) of the sample's cross-routed tiles; (0, 0) sees none."""

    @property
    def start(self) -> int:
        return self.tokens[0].position

    @property
    def stop(self) -> int:
        return self.tokens[-1].position + 1

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)


def token_runs(encoded: EncodedSample, tokenizer: Tokenizer) -> list[TokenRun]:
    """Returns all N tokens of a sample, in order; one is trained when some label asks for it."""
    count = len(encoded.token_ids)
    roles: list[Role] = ["context"] * count
    for position in encoded.label_positions.tolist():
        roles[position + 1] = "trained"
    for position in encoded.image_positions.tolist():
        roles[position] = "image"
    tiles = _tiles_in_slots(encoded)
    spans = np.zeros((count, 2), dtype=np.int64)
    for start, stop, first, last in encoded.cross.spans.tolist():
        spans[start:stop] = first, last
    tokens = read_tokens(encoded.token_ids.tolist(), tokenizer)

    def kind(token: Token) -> tuple[Role, int | None, tuple[int, int]]:
        first, last = spans[token.position].tolist()
        return roles[token.position], tiles.get(token.position), (first, last)

    return [
        TokenRun(role, tuple(members), tile, span)
        for (role, tile, span), members in groupby(tokens, kind)
    ]


def read_tokens(ids: Sequence[int], tokenizer: Tokenizer) -> list[Token]:
    """Returns each id's own text; a character that several tokens share comes with the last."""
    config = tokenizer.config
    special = {
        tokenizer.pad: config.pad,
        tokenizer.turn_start: config.turn_start,
        tokenizer.turn_end: config.turn_end,
    }
    found: list[Token] = []
    before: list[int] = []
    pending: list[int] = []
    for position, number in enumerate(ids):
        if number in special:
            found.append(Token(position, number, special[number], True))
            before, pending = [], []
            continue
        pending.append(number)
        text = _text_after(before, pending, tokenizer)
        if text.endswith(_BROKEN) and len(pending) < _MAX_BYTES_OF_A_CHARACTER:
            found.append(Token(position, number, "", False))
            continue
        found.append(Token(position, number, text, False))
        before, pending = [number], []
    return found


def _text_after(before: list[int], pending: list[int], tokenizer: Tokenizer) -> str:
    """Returns the text of the pending ids; the id before keeps decoders from dropping a space."""
    head, whole = tokenizer.decode(before), tokenizer.decode(before + pending)
    return whole[len(head) :] if whole.startswith(head) else tokenizer.decode(pending)


def _tiles_in_slots(encoded: EncodedSample) -> dict[int, int]:
    """Returns for every slot's position which of the sample's T tiles stands there."""
    decoder_tiles = np.flatnonzero(~encoded.cross.is_cross_T)
    if len(decoder_tiles) == 0:
        return {}
    owners = np.repeat(decoder_tiles, len(encoded.image_positions) // len(decoder_tiles))
    return dict(zip(encoded.image_positions.tolist(), owners.tolist(), strict=True))
