"""The words that ask for a caption, an answer or a page of text: `prompts.yaml`, chosen by sample.

Which prompt a sample gets is a function of its key: it reads the same in every epoch and run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Literal, get_args

from nvlm_train.data.ordering import stable_hash

PromptFamily = Literal["pretrain", "sft"]
CaptionTask = Literal["caption"]
QuestionTask = Literal["vqa", "vqa_raw", "docvqa", "multiple_choice", "referred_ocr"]
PageTask = Literal["ocr", "ocr_multi", "ocr_markdown", "grounded_ocr", "latex"]
Task = CaptionTask | QuestionTask | PageTask

CAPTION_TASKS: tuple[CaptionTask, ...] = get_args(CaptionTask)
"""Tasks of records with `caption`."""
QUESTION_TASKS: tuple[QuestionTask, ...] = get_args(QuestionTask)
"""Tasks of records with `question`."""
PAGE_TASKS: tuple[PageTask, ...] = get_args(PageTask)
"""Tasks of records with `text`."""

Prompts = Mapping[PromptFamily, Sequence[str]]
_FILE = Path(__file__).with_name("prompts.yaml")


@cache
def load_prompts() -> Mapping[Task, Prompts]:
    """Returns every task's prompts of either family."""
    import yaml

    content: Mapping[Task, Prompts] = yaml.safe_load(_FILE.read_text(encoding="utf-8"))
    assert set(content) == {*CAPTION_TASKS, *QUESTION_TASKS, *PAGE_TASKS}, f"{_FILE}: other tasks"
    return content


def choose_prompt(family: PromptFamily, task: Task, key: str) -> str:
    """Returns the sample's prompt, with `{question}` and `{choices}` in it where the task has them."""
    prompts = load_prompts()[task][family]
    return prompts[stable_hash("prompt", key) % len(prompts)]


def fill_prompt(prompt: str, question: str, choices: Sequence[str]) -> str:
    """Returns the prompt with the record's words; braces inside those stay as they are.

    >>> fill_prompt("{question}\\n{choices}", "Which?", ["cat", "dog"])
    'Which?\\nA. cat\\nB. dog'
    """
    lettered = "\n".join(f"{letter(number)}. {choice}" for number, choice in enumerate(choices))
    before, _, after = prompt.partition("{question}")
    return before.replace("{choices}", lettered) + question + after.replace("{choices}", lettered)


def letter(number: int) -> str:
    """Returns the letter of a choice.

    >>> letter(0), letter(25)
    ('A', 'Z')
    """
    return chr(ord("A") + number)


def choose_weighted(weights: Sequence[float], key: str) -> int:
    """Draws an index in proportion to the weights, always the same one for a key.

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
