"""Records of every accepted form, and the exact words for those that are not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nvlm_train.data.samples.messages import Message
from nvlm_train.data.samples.prompts import (
    PAGE_TASKS,
    QUESTION_TASKS,
    PromptFamily,
    choose_prompt,
    choose_weighted,
    load_prompts,
)
from nvlm_train.data.samples.records import read_messages


def messages(record: Any, num_images: int = 0, family: PromptFamily = "sft") -> tuple[Message, ...]:
    return read_messages(json.dumps(record).encode(), "key", num_images, family)


def said(question: str, answer: str) -> tuple[Message, ...]:
    return Message("user", question), Message("assistant", answer)


def test_llava_conversation_with_system_message() -> None:
    record = {
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "<image>\nWhat?"},
            {"from": "gpt", "value": "A cat."},
        ]
    }
    assert messages(record, 1) == (
        Message("system", "Be brief."),
        *said("<image>\nWhat?", "A cat."),
    )


def test_openai_messages_with_parts() -> None:
    parts = [{"type": "image_url"}, {"type": "text", "text": "What?"}]
    record = {
        "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "Hm."}]
    }
    assert messages(record, 1) == said("<image>\nWhat?", "Hm.")


def test_caption_and_page() -> None:
    caption = messages({"caption": "A red circle."}, 1)
    assert caption[0].text.removeprefix("<image>\n") in load_prompts()["caption"]["sft"]
    assert caption[1] == Message("assistant", "A red circle.")
    page = messages({"text": "lorem"}, 1, "pretrain")
    assert page[0].text.removeprefix("<image>\n") in load_prompts()["ocr"]["pretrain"]


def test_question_keeps_braces() -> None:
    assert "a {b}?" in messages({"question": "a {b}?", "answer": "c"})[0].text


def test_answer_weights_are_followed_and_fixed_per_key() -> None:
    chosen = [choose_weighted([3.0, 1.0, 0.0], f"k{n}") for n in range(4000)]
    assert abs(chosen.count(0) / 4000 - 0.75) < 0.03 and 2 not in chosen
    record = {
        "question": "q",
        "answers": [{"answer": "x", "weight": 0}, {"answer": "y", "weight": 2}],
    }
    assert messages(record)[1].text == "y"
    assert choose_weighted([1, 1], "same") == choose_weighted([1, 1], "same")
    assert {choose_prompt("sft", "caption", f"k{n}") for n in range(200)} == set(
        load_prompts()["caption"]["sft"]
    )


def test_without_markers_the_first_user_turn_gets_them_all() -> None:
    record = {
        "messages": [
            {"role": "user", "content": "Compare."},
            {"role": "assistant", "content": "Same."},
        ]
    }
    assert messages(record, 2)[0].text == "<image>\n<image>\nCompare."


def chat(question: str, answer: str = "a") -> dict[str, Any]:
    return {
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    }


@pytest.mark.parametrize(
    ("record", "num_images", "message"),
    [
        (
            chat("<image> what?"),
            0,
            "image marker without image: the text has 1 <image> and the sample has 0 images; "
            "add the image members or remove the markers",
        ),
        (
            chat("<image> what?"),
            2,
            "image without image marker: the text has 1 <image> and the sample has 2 images; "
            "write one marker for each image, or none at all",
        ),
        (
            chat("what?", "<image>"),
            1,
            "image marker in assistant turn: <image> belongs into user turns; remove it",
        ),
        (
            {"caption": "x"},
            0,
            "image is missing: a caption or text record describes an image; add KEY.jpg or KEY.png",
        ),
        (
            {"question": "q"},
            1,
            "record cannot be read: question without answer; add answer or answers",
        ),
        ({"caption": " "}, 1, "record cannot be read: caption=' ' must be text that is not empty"),
        (
            {"txet": "x"},
            1,
            "record cannot be read: fields ['txet'] hold none of conversations, messages, "
            "question, caption, text",
        ),
        ([1], 0, "record cannot be read: it is a list, not an object"),
        (
            {"conversations": []},
            0,
            "record cannot be read: conversations must be a list of turns that is not empty",
        ),
        (
            {"conversations": [{"from": "humam", "value": "x"}]},
            0,
            "record cannot be read: conversations[0].from='humam' is none of "
            "system, human, user, gpt, assistant",
        ),
        (
            {"messages": [{"role": "user", "content": 3}]},
            0,
            "record cannot be read: messages[0].content must be text or a list of parts",
        ),
        (
            {"question": "q", "answers": [{"answer": "a", "weight": -1}]},
            0,
            "record cannot be read: answer weights [-1.0] must be positive",
        ),
    ],
)
def test_messages(record: Any, num_images: int, message: str) -> None:
    with pytest.raises(ValueError, match="^") as caught:
        messages(record, num_images)
    assert str(caught.value) == message


def test_half_a_surrogate_pair_is_no_text() -> None:
    for record in (b'{"question": "\\ud800", "answer": "a"}', json.dumps(chat("\ud800")).encode()):
        with pytest.raises(ValueError, match="^record cannot be read: .* is not Unicode text"):
            read_messages(record, "key", 0, "sft")


def test_weights_without_a_finite_sum() -> None:
    for weights in ([float("inf"), 1.0], [float("nan")], [0.0]):
        with pytest.raises(ValueError, match="answer weights"):
            choose_weighted(weights, "key")


def test_not_json() -> None:
    with pytest.raises(ValueError, match="^record cannot be read: it is not JSON"):
        read_messages(b'{"a": \xff', "key", 0, "sft")


@pytest.mark.parametrize("family", ["pretrain", "sft"])
def test_every_task_has_prompts_with_its_fields(family: PromptFamily) -> None:
    for task, families in load_prompts().items():
        prompts = families[family]
        assert prompts and len(set(prompts)) == len(prompts)
        assert all(prompt == prompt.strip() and prompt.isascii() for prompt in prompts)
        assert all(prompt.count("{question}") == (task in QUESTION_TASKS) for prompt in prompts)
        assert all(prompt.count("{choices}") == (task == "multiple_choice") for prompt in prompts)


@pytest.mark.parametrize("task", PAGE_TASKS)
def test_a_page_names_its_task(task: str) -> None:
    asked = messages({"text": "lorem", "task": task}, 1, "pretrain")
    prompts: dict[str, Any] = dict(load_prompts())
    assert asked[0].text.removeprefix("<image>\n") in prompts[task]["pretrain"]
    assert asked[1] == Message("assistant", "lorem")


def test_a_question_names_its_task() -> None:
    record = {"question": "Who signed {choices}?", "answer": "Ada"}
    assert messages(record | {"task": "vqa_raw"}) == said("Who signed {choices}?", "Ada")
    asked = {
        read_messages(json.dumps(record | {"task": "docvqa"}).encode(), f"k{n}", 0, "sft")[0].text
        for n in range(99)
    }
    prompts = load_prompts()["docvqa"]["sft"]
    assert asked == {prompt.replace("{question}", "Who signed {choices}?") for prompt in prompts}


@pytest.mark.parametrize("answer", ["B", "dog", 1])
def test_multiple_choice_is_answered_with_the_letter(answer: object) -> None:
    record = {"question": "Which {question}?", "choices": ["cat", "dog", "{question}"]}
    user, assistant = messages(record | {"answer": answer})
    assert user.text.startswith("Which {question}?\nA. cat\nB. dog\nC. {question}\n")
    assert assistant == Message("assistant", "B")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "q", "answer": "a", "task": "ocr"}, "task='ocr' of a record with question is none"),
        ({"caption": "c", "task": "docvqa"}, r"task='docvqa' of a record with caption is none of caption"),
        ({"text": "t", "task": 7}, r"task=7 of a record with text is none of ocr, ocr_multi"),
        ({"question": "q", "choices": ["a"], "answer": "a"}, "choices must be a list of 2 to 26"),
        ({"question": "q", "choices": ["a", 1], "answer": "a"}, r"choices\[1\]=1 must be text"),
        ({"question": "q", "choices": ["a", "b"], "answer": "C"}, r"answer='C' is none .* \(A to B\)"),
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, "no number from 0 to 1"),
    ],
)  # fmt: skip
def test_tasks_that_do_not_fit_say_why(record: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"record cannot be read: .*{message}"):
        messages(record, 1)
