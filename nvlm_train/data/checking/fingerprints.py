"""What makes two samples the same, or nearly: hashes of bytes, of looks, and of runs of words.

Hashes are 64 bits wide: among a hundred million samples two different ones share one with
probability 3 in 10,000. Shape legend: G grams.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nvlm_train.data.samples.messages import Message
from nvlm_train.errors import NvlmError

if TYPE_CHECKING:
    from torch import Tensor

GRAM_WORDS = 13
"""Words in a row that count as an overlap (Brown et al. 2020, "Language Models are Few-Shot
Learners", appendix C: words in lower case, without punctuation)."""
LEAST_WORDS = 8
"""Texts of 8 to 12 words are compared as a whole; the same appendix never goes below 8."""

_SPACELESS = "\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"[{_SPACELESS}]|[^\W{_SPACELESS}]+")
"""A word; in scripts written without spaces, a character."""
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_PLAIN_FIELDS = ("question", "answer", "answers", "caption", "text")


def split_words(text: str) -> list[str]:
    """Returns the words in lower case, without punctuation.

    >>> split_words("What's  THIS, a tile?")
    ['what', 's', 'this', 'a', 'tile']
    """
    return _WORD.findall(text.lower())


def sample_texts(record: bytes, messages: Sequence[Message]) -> list[str]:
    """Returns the record's own texts, one a message, without prompts that the framework would add."""
    fields = json.loads(record)
    if fields.keys() & {"conversations", "messages"}:
        return [message.text for message in messages if message.role != "system"]
    values = [fields[name] for name in _PLAIN_FIELDS if name in fields]
    return [
        value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)
        for value in values
    ]


def text_grams(texts: Sequence[str]) -> NDArray[np.uint64]:
    """Hashes all runs of 13 words inside a text: uint64 [G], ascending and different."""
    found = [_grams(split_words(text)) for text in texts]
    return np.unique(np.concatenate([np.empty(0, dtype=np.uint64), *found]))


def hash_parts(*parts: bytes) -> int:
    """Returns the first 64 bits of a SHA-256 over the parts and their lengths."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return int.from_bytes(digest.digest()[:8], "big")


def perceptual_hash(image_CHW: Tensor) -> int:
    """Returns 64 bits that stay about the same when an image is resized or compressed again.

    pHash: signs of the low frequencies of its brightness, by the `imagehash` library.

    Raises:
        NvlmError: the library is not installed.
    """
    try:
        import imagehash
    except ImportError as error:
        raise NvlmError(
            "package=ImageHash is not installed; `pip install nvlm-train[check]` brings it"
        ) from error
    image = Image.fromarray(np.ascontiguousarray(image_CHW.permute(1, 2, 0).numpy()))
    bits = imagehash.phash(image).hash
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def _grams(words: Sequence[str]) -> NDArray[np.uint64]:
    if len(words) < LEAST_WORDS:
        return np.empty(0, dtype=np.uint64)
    width = min(len(words), GRAM_WORDS)
    hashes = np.array([_word_hash(word) for word in words], dtype=np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(hashes, width)
    with np.errstate(over="ignore"):
        # A polynomial in 64-bit arithmetic; the width keeps short texts apart from parts of long ones.
        total = np.full(len(windows), np.uint64(width))
        for column in range(width):
            total = total * _FACTOR + windows[:, column]
    return total


@lru_cache(maxsize=1 << 16)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big")
