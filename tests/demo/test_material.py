"""The demo's text, pages, captions and chats: deterministic, and held-out text stays held out."""

import random

import pytest

pytest.importorskip("easy_vqa")
pytest.importorskip("matplotlib")

from nvlm_train.demo.backbones.twins import page_slots
from nvlm_train.demo.captions import (
    Question,
    caption_of,
    read_captions,
    read_image_paths,
    read_questions,
)
from nvlm_train.demo.chats import draw_chat
from nvlm_train.demo.corpus import clean_paragraph, read_paragraphs, sentences_of
from nvlm_train.demo.pages import MAX_PAGE_CHARS, render_page, render_strip, to_capitals


@pytest.mark.slow
def test_no_heldout_sentence_is_in_the_training_text() -> None:
    train = {s for text in read_paragraphs("train") for s in sentences_of(text)}
    heldout = {s for text in read_paragraphs("heldout") for s in sentences_of(text)}
    assert len(train) > 3000 and len(heldout) > 300
    assert train.isdisjoint(heldout)


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="'test'; it must be 'train' or 'heldout'"):
        read_paragraphs("test")  # type: ignore[arg-type]


def test_code_is_no_prose() -> None:
    assert (
        clean_paragraph(">>> print('x')\nx and much more text so that length is no reason.") is None
    )
    text = "The *name* is bound\n   in the scope that encloses the class statement, as usual."
    assert clean_paragraph(text) == " ".join(text.replace("*", "").split())


@pytest.mark.parametrize("render", [render_page, render_strip])
def test_pages_are_a_function_of_split_and_index(render) -> None:  # type: ignore[no-untyped-def]
    first, again, other = render(3, "heldout"), render(3, "heldout"), render(3, "train")
    assert first.text == again.text != other.text
    assert first.image.tobytes() == again.image.tobytes()


def test_a_page_shows_heldout_text_on_the_shape_of_its_grid() -> None:
    capitals = " ".join(to_capitals(text) for text in read_paragraphs("heldout"))
    for index in range(20):
        page = render_page(index, "heldout")
        columns, rows = page.grid
        assert page.text in capitals
        assert 4 <= columns * rows <= 6 and len(page.text) <= MAX_PAGE_CHARS
        assert page.image.size == (columns * 192, rows * 192)


def test_page_slots_follow_tiles_then_cells() -> None:
    text = "".join(chr(ord("A") + n % 26) for n in range(96))
    tiles = page_slots(text, (3, 2))  # 12 characters a line, 8 lines
    assert "".join(tiles[0]) == text[0:4] + text[12:16] + text[24:28] + text[36:40]
    assert "".join(tiles[4][:4]) == text[52:56]


def test_captions_say_what_the_answers_give_away() -> None:
    asked = [
        Question("is there not a blue shape?", "no", 0),
        Question("is there a red shape?", "no", 0),
        Question("does the image not contain a circle?", "yes", 0),
    ]
    assert caption_of(asked) == "a blue shape"
    assert caption_of(asked[1:]) is None
    assert caption_of([Question("is no circle present?", "no", 0)]) == "a circle"
    assert (
        caption_of([*asked, Question("what is the blue shape?", "triangle", 0)])
        == "a blue triangle"
    )


def test_captions_agree_with_every_training_answer() -> None:
    captions = read_captions()
    for question in random.Random(0).sample(read_questions("train"), 2000):
        if question.answer not in ("yes", "no") and question.image_id in captions:
            words = captions[question.image_id].split()
            assert question.answer in words, (question, words)


def test_easy_vqa_is_whole() -> None:
    assert (len(read_questions("train")), len(read_questions("heldout"))) == (38575, 9673)
    assert (len(read_image_paths("train")), len(read_image_paths("heldout"))) == (4000, 1000)


def test_chats_are_a_function_of_split_and_index() -> None:
    chats = [draw_chat(index, "heldout") for index in range(50)]
    assert chats == [draw_chat(index, "heldout") for index in range(50)]
    assert len(set(chats)) > 40 and all(chat.user and chat.assistant for chat in chats)
    assert chats[0].conversations()[1] == {"from": "gpt", "value": chats[0].assistant}
