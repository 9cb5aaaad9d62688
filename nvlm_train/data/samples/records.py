"""A sample's JSON record as chat messages.

Accepted: `{"conversations": [{"from", "value"}]}` (LLaVA), `{"messages": [{"role", "content"}]}`
(OpenAI), `{"caption"}` (a text, or several to choose from), `{"question", "answer"}` or
`{"question", "answers": [{"answer", "weight"}]}`, `{"question", "choices", "answer"}`, and
`{"text"}` (a page to read). Where the fields leave it open, `task` says what kind of question or
page it is (`docvqa`, `ocr_markdown`, ...: see `prompts.yaml`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from nvlm_train.data.samples.messages import Message, Role, place_images
from nvlm_train.data.samples.prompts import (
    CAPTION_TASKS,
    PAGE_TASKS,
    QUESTION_TASKS,
    PromptFamily,
    Task,
    choose_prompt,
    choose_weighted,
    fill_prompt,
    letter,
)
from nvlm_train.tokens import IMAGE_MARKER

ImageSize = tuple[int, int]
"""(width, height), upright."""


class RawSample(NamedTuple):
    """A sample as a shard holds it."""

    key: str
    record: bytes
    """JSON."""
    sizes: list[ImageSize]
    """(width, height) of its images, in their order."""


_ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}

_TASKS: tuple[tuple[str, tuple[Task, ...], Task], ...] = (
    ("question", QUESTION_TASKS, "vqa"),
    ("caption", CAPTION_TASKS, "caption"),
    ("text", PAGE_TASKS, "ocr"),
)
"""(field, tasks of records that have it, the usual one)."""


def read_messages(
    record: bytes, key: str, num_images: int, family: PromptFamily
) -> tuple[Message, ...]:
    """Returns the messages of a record, with one `<image>` marker per image.

    Raises:
        ValueError: "record cannot be read: ...", or a marker that has no image, or the reverse.
    """
    try:
        fields = json.loads(record)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"record cannot be read: it is not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise ValueError(f"record cannot be read: it is a {type(fields).__name__}, not an object")
    if (
        num_images == 0
        and "question" not in fields
        and not fields.keys() & {"conversations", "messages"}
    ):
        raise ValueError(
            "image is missing: a caption or text record describes an image; add KEY.jpg or KEY.png"
        )
    messages = _messages_of(fields, key, family)
    return place_images(messages, num_images)


def _messages_of(fields: Mapping[str, Any], key: str, family: PromptFamily) -> tuple[Message, ...]:
    if "conversations" in fields:
        return _chat(fields["conversations"], "conversations", "from", "value")
    if "messages" in fields:
        return _chat(fields["messages"], "messages", "role", "content")
    for name, tasks, usual in _TASKS:
        if name in fields:
            return _asked(fields, key, family, name, _task(fields, name, tasks, usual))
    raise ValueError(
        f"record cannot be read: fields {sorted(fields)} hold none of conversations, messages, "
        "question, caption, text"
    )


def _task(fields: Mapping[str, Any], name: str, tasks: Sequence[Task], usual: Task) -> Task:
    """Returns the record's own `task`, or the usual one of records with this field."""
    if "task" not in fields:
        return "multiple_choice" if name == "question" and "choices" in fields else usual
    for task in tasks:
        if fields["task"] == task:
            return task
    raise ValueError(
        f"record cannot be read: task={fields['task']!r} of a record with {name} is none of "
        f"{', '.join(tasks)}"
    )


def _asked(
    fields: Mapping[str, Any], key: str, family: PromptFamily, name: str, task: Task
) -> tuple[Message, ...]:
    """Returns a prompt of the task's family, and the answer."""
    prompt = choose_prompt(family, task, key)
    if name != "question":
        return Message("user", prompt), Message(
            "assistant", _text(_one_of(fields, name, key), name)
        )
    choices = _choices(fields) if task == "multiple_choice" else []
    question = fill_prompt(prompt, _text(fields, "question"), choices)
    answer = _letter(fields, choices) if choices else _answer(fields, key)
    return Message("user", question), Message("assistant", answer)


def _choices(fields: Mapping[str, Any]) -> list[str]:
    choices = fields.get("choices")
    if not isinstance(choices, list) or not 2 <= len(choices) <= 26:
        raise ValueError("record cannot be read: choices must be a list of 2 to 26 texts")
    return [_text({f"choices[{n}]": each}, f"choices[{n}]") for n, each in enumerate(choices)]


def _letter(fields: Mapping[str, Any], choices: Sequence[str]) -> str:
    """Returns the right choice's letter; `answer` is the letter, the choice's text, or its number."""
    answer = fields.get("answer")
    letters = [letter(number) for number in range(len(choices))]
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return letters[answer]
    if answer in letters:
        return str(answer)
    if answer in choices:
        return letters[choices.index(answer)]
    raise ValueError(
        f"record cannot be read: answer={answer!r} is none of the choices, no letter of one "
        f"({letters[0]} to {letters[-1]}) and no number from 0 to {len(choices) - 1}"
    )


def _chat(value: object, name: str, role_field: str, text_field: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"record cannot be read: {name} must be a list of turns that is not empty")
    messages: list[Message] = []
    for number, item in enumerate(value):
        where = f"{name}[{number}]"
        if not isinstance(item, dict):
            raise ValueError(f"record cannot be read: {where} is not an object")
        role = _ROLES.get(str(item.get(role_field)))
        if role is None:
            raise ValueError(
                f"record cannot be read: {where}.{role_field}={item.get(role_field)!r} is none of "
                f"{', '.join(_ROLES)}"
            )
        if role == "system" and number:
            raise ValueError(
                f"record cannot be read: {where} is a system turn, which can only be first"
            )
        messages.append(Message(role, _content(item.get(text_field), f"{where}.{text_field}")))
    return tuple(messages)


def _content(value: object, where: str) -> str:
    """Returns text, or OpenAI's list of parts as text: an image becomes a marker on its own line."""
    if isinstance(value, str):
        return _valid(value, where)
    if not isinstance(value, list):
        raise ValueError(f"record cannot be read: {where} must be text or a list of parts")
    texts: list[str] = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(_valid(part["text"], where))
        elif kind in ("image", "image_url"):
            texts.append(f"{IMAGE_MARKER}\n")
        else:
            raise ValueError(f"record cannot be read: {where} has a part of unknown type={kind!r}")
    return "".join(texts)


def _answer(fields: Mapping[str, Any], key: str) -> str:
    """Returns `answer`, or one of `answers` (texts or `{"answer", "weight"}`) drawn by weight."""
    if "answer" in fields:
        return _text(fields, "answer")
    answers = fields.get("answers")
    if not isinstance(answers, Sequence) or isinstance(answers, str) or not answers:
        raise ValueError("record cannot be read: question without answer; add answer or answers")
    options = [{"answer": option} if isinstance(option, str) else option for option in answers]
    if not all(isinstance(option, dict) for option in options):
        raise ValueError(
            "record cannot be read: answers must be texts or objects with answer, weight"
        )
    try:
        weights = [float(option.get("weight", 1.0)) for option in options]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"record cannot be read: an answer's weight is no number ({error})"
        ) from error
    return _text(options[choose_weighted(weights, key)], "answer")


def _one_of(fields: Mapping[str, Any], name: str, key: str) -> Mapping[str, Any]:
    """Returns the fields; of several texts one stays, always the same for a key."""
    value = fields[name]
    if not isinstance(value, list) or not value:
        return fields
    return {name: value[choose_weighted([1.0] * len(value), key)]}


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"record cannot be read: {name}={value!r} must be text that is not empty")
    return _valid(value, name)


def _valid(text: str, where: str) -> str:
    """Refuses half a surrogate pair (JSON's `\\ud800`) is no character and cannot be tokenised."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"record cannot be read: {where} is not Unicode text ({error})") from error
    return text
