"""Prompts for records that bring none: captions, questions, pages of text. Our own wording.

The families follow the released ones (short prompts in pretraining, instructions in SFT). Which
prompt a sample gets is a function of its key: it reads the same in every epoch and run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from nvlm_train.data.ordering import stable_hash

PromptFamily = Literal["pretrain", "sft"]
Task = Literal["caption", "vqa", "ocr"]

PROMPTS: dict[tuple[PromptFamily, Task], tuple[str, ...]] = {
    ("pretrain", "caption"): (
        "Describe this picture briefly.",
        "What does the picture show?",
        "Write a short caption.",
        "Summarise this picture in a sentence.",
        "Say what can be seen here.",
    ),
    ("pretrain", "vqa"): (
        "Question: {question} Answer:",
        "Question: {question} Short answer:",
    ),
    ("pretrain", "ocr"): (
        "Read the text in this picture.",
        "Transcribe the text.",
        "What is written here?",
        "Write out all of the text shown.",
    ),
    ("sft", "caption"): (
        "Please describe this image.",
        "Can you tell me what this image shows?",
        "Give a description of the image.",
        "Write a caption that fits this image.",
        "Describe what is visible in the image.",
        "What do you see in this image?",
    ),
    ("sft", "vqa"): (
        "{question}\nAnswer with one word or a short phrase.",
    ),
    ("sft", "ocr"): (
        "Please transcribe all text in this image.",
        "What text does the image contain? Write it out in reading order.",
        "Read the page and give its text.",
        "Extract the text of this image.",
    ),
}  # fmt: skip


def choose_prompt(family: PromptFamily, task: Task, key: str) -> str:
    """The prompt of this sample."""
    prompts = PROMPTS[family, task]
    return prompts[stable_hash("prompt", key) % len(prompts)]


def choose_weighted(weights: Sequence[float], key: str) -> int:
    """Index drawn in proportion to the weights, always the same one for a key.

    Raises:
        ValueError: a negative weight, or no positive one.
    """
    total = sum(weights)
    if not 0 < total < math.inf or min(weights) < 0:
        raise ValueError(f"record cannot be read: answer weights {list(weights)} must be positive")
    point = stable_hash("answer", key) / 2**64 * total
    for number, weight in enumerate(weights):
        point -= weight
        if point < 0:
            return number
    return max(range(len(weights)), key=lambda number: weights[number])
