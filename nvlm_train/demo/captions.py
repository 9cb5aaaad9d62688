"""Reads easy-vqa's images and questions, and makes captions from the answers to its training questions.

An image of easy-vqa shows one shape of one colour, 64 x 64 pixels. Its training questions name the
shape, the colour or both. A caption says what they reveal and nothing else.
"""

import functools
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import easy_vqa

from nvlm_train.demo.corpus import Split

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
NEGATIONS = frozenset(("not", "no"))  # "is there not a ...", "is no ... present"
CAPTION_PROMPT = "Describe the image."
READ_PROMPT = "Read the text."


@dataclass(frozen=True)
class Question:
    """Holds one question of easy-vqa about one image."""

    text: str
    answer: str
    image_id: int


@functools.cache
def _cached_questions(split: Split) -> tuple[Question, ...]:
    read = easy_vqa.get_train_questions if split == "train" else easy_vqa.get_test_questions
    return tuple(Question(*row) for row in zip(*read(), strict=True))


def read_questions(split: Split) -> list[Question]:
    """Returns all 38,575 training or 9,673 test (`heldout`) questions, in the package's order."""
    return list(_cached_questions(split))


def read_image_paths(split: Split) -> dict[int, Path]:
    """Returns image id -> PNG file: 4,000 for training or 1,000 for testing (`heldout`)."""
    paths = (
        easy_vqa.get_train_image_paths() if split == "train" else easy_vqa.get_test_image_paths()
    )
    return {image_id: Path(path) for image_id, path in sorted(paths.items())}


def caption_of(questions: Iterable[Question]) -> str | None:
    """Returns `a blue circle`, `a circle` or `a blue shape`, as far as the answers say, or None."""
    shape = colour = None
    for question in questions:
        words = question.text.rstrip("?").split()
        known = {question.answer}
        affirmed = (question.answer == "yes") == NEGATIONS.isdisjoint(words)
        # "what color is the circle?" also names the shape
        if question.answer in SHAPES + COLOURS or affirmed:
            known.update(words)
        shape = next((name for name in SHAPES if name in known), shape)
        colour = next((name for name in COLOURS if name in known), colour)
    if shape is None and colour is None:
        return None
    return " ".join(["a", *([colour] if colour else []), shape or "shape"])


def read_captions() -> dict[int, str]:
    """Returns training image id -> caption, for every image whose questions reveal something."""
    by_image: dict[int, list[Question]] = defaultdict(list)
    for question in _cached_questions("train"):
        by_image[question.image_id].append(question)
    captions = {image_id: caption_of(asked) for image_id, asked in sorted(by_image.items())}
    return {image_id: caption for image_id, caption in captions.items() if caption}
