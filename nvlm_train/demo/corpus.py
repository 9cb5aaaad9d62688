"""Reads real English prose that comes with every CPython: the language reference and docstrings.

A document (a topic of `pydoc_data.topics` or one module's docstrings) belongs to one split by a
hash of its name, and a training paragraph that shares a sentence with a held-out one is dropped, so
that held-out text is never trained on.
"""

import ast
import functools
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Literal

Split = Literal["train", "heldout"]

HELDOUT_PERCENT = 10  # of documents
MIN_PARAGRAPH_CHARS = 60
MIN_PROSE_SHARE = 0.92  # letters, spaces and sentence punctuation among all characters
# Absent from some installations, deprecated, or no prose.
SKIPPED_PACKAGES = frozenset(
    ("site-packages", "dist-packages", "test", "idlelib", "lib2to3")
    + ("tkinter", "distutils", "ensurepip", "pydoc_data")
)
CODE_MARKS = (">>>", "::=", "|", "+--", "...  ", "==", "\\", "->", "__", "%", "{", "[", "~")
ASCII_OF = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-"}
)


def split_of(document: str) -> Split:
    """Returns the split that a document belongs to, which depends on its name only."""
    digest = hashlib.sha256(document.encode()).digest()
    bucket = int.from_bytes(digest[:4], "big") % 100
    return "heldout" if bucket < HELDOUT_PERCENT else "train"


def clean_paragraph(block: str) -> str | None:
    """Returns an RST block as one line of plain ASCII prose, or None when the block is no prose."""
    if any(mark in block for mark in CODE_MARKS) or "\n---" in block:
        return None
    text = re.sub(r"\s+", " ", block.translate(ASCII_OF)).strip()
    text = re.sub(r'[*`"]', "", text)
    text = re.sub(r"^(\d+\.|-|o) ", "", text)
    if len(text) < MIN_PARAGRAPH_CHARS or not text.isascii() or not text[0].isupper():
        return None
    prose = sum(char.isalpha() or char in " .,;'" for char in text)
    if prose < MIN_PROSE_SHARE * len(text) or text[-1] not in ".:":
        return None
    return text


def sentences_of(paragraph: str) -> list[str]:
    """Returns a paragraph's sentences, cut after a full stop, colon or semicolon before a space."""
    return [part.strip() for part in re.split(r"(?<=[.:;]) +", paragraph) if part.strip()]


def _docstrings(path: Path) -> str:
    """Returns all docstrings of a source file, in the order of its syntax tree, joined by empty lines."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # a few files are examples of other encodings
        return ""
    texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return "\n\n".join(text for text in texts if text)


def _documents(split: Split) -> Iterator[tuple[str, str]]:
    """Yields (name, raw text) of every document of a split, in a fixed order."""
    for topic in sorted(topics):
        if split_of(topic) == split:
            yield topic, topics[topic]
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted([*library.glob("*.py"), *library.glob("[a-z]*/*.py")]):
        name = path.relative_to(library).as_posix()
        if name.split("/")[0] not in SKIPPED_PACKAGES and split_of(name) == split:
            yield name, _docstrings(path)


def _paragraphs_of(split: Split) -> dict[str, None]:
    """Returns the split's clean paragraphs, each once, in document order."""
    blocks = (block for _, text in _documents(split) for block in text.split("\n\n"))
    return {text: None for text in map(clean_paragraph, blocks) if text}


@functools.cache
def _cached_paragraphs(split: Split) -> tuple[str, ...]:
    if split == "heldout":
        return tuple(_paragraphs_of("heldout"))
    heldout = {s for text in _cached_paragraphs("heldout") for s in sentences_of(text)}
    return tuple(t for t in _paragraphs_of("train") if heldout.isdisjoint(sentences_of(t)))


def read_paragraphs(split: Split) -> list[str]:
    """Returns the clean paragraphs of one split. No sentence of `heldout` occurs in `train`."""
    if split not in ("train", "heldout"):
        raise ValueError(f"split is {split!r}; it must be 'train' or 'heldout'")
    return list(_cached_paragraphs(split))
