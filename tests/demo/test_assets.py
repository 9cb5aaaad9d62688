"""The shipped backbones: they load in transformers, and the tokenizer does what pages rely on."""

import hashlib
from importlib.resources import files
from pathlib import Path

import pytest
import torch

pytest.importorskip("easy_vqa")
pytest.importorskip("matplotlib")

ASSETS = Path(str(files("nvlm_train.demo"))) / "assets"


@pytest.fixture(scope="module")
def tokenizer():  # type: ignore[no-untyped-def]
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(ASSETS / "language_model" / "tokenizer.json"))


SHA_256 = {
    "language_model/model.safetensors": "4caddfd538ae0d39fad1047a559813e6489ff1fde7ea1c6bf37e0f81dce1a633",
    "language_model/tokenizer.json": "416459a5623c2519c2b6d0b9af05faef7f1df2351ef298d7dba12f8a66d3e391",
    "vision_encoder/model.safetensors": "d355103caeb3d0832ddef8422f79ab21bb97be317e7f1f23ade9a2fd93d449e2",
}
"""Runs that were begun with these files go on with no others."""


@pytest.mark.parametrize("name", SHA_256)
def test_the_files_are_those_that_runs_were_begun_with(name: str) -> None:
    assert hashlib.sha256((ASSETS / name).read_bytes()).hexdigest() == SHA_256[name]


def test_every_byte_has_a_token(tokenizer) -> None:  # type: ignore[no-untyped-def]
    """Characters of two UTF-8 bytes hold every byte that can stand in a text, but those of ASCII."""
    text = "".join(map(chr, range(32, 0x7FF))) + "\u4e27\U0001f600"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_tokenizer_round_trip(tokenizer) -> None:  # type: ignore[no-untyped-def]
    from nvlm_train.demo.chats import draw_chat

    texts = ["<Image><tile_1>\n", "na\u00efve \u2013 \u4f60\u597d", "HELLO, World 12 (a_b)\n\n\t x"]
    texts += [draw_chat(index, "heldout").assistant for index in range(20)]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_a_character_of_a_page_is_one_token(tokenizer) -> None:  # type: ignore[no-untyped-def]
    from nvlm_train.demo.pages import LEGIBLE, render_page

    for text in [LEGIBLE, *(render_page(index, "heldout").text for index in range(20))]:
        assert len(tokenizer.encode(text).ids) == len(text)


def test_special_tokens_come_first(tokenizer) -> None:  # type: ignore[no-untyped-def]
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    assert [tokenizer.token_to_id(name) for name in names] == [0, 1, 2]


def test_language_model_loads_and_knows_heldout_text(tokenizer) -> None:  # type: ignore[no-untyped-def]
    from transformers import Qwen2ForCausalLM

    from nvlm_train.demo.backbones.language import SampleMaker, heldout_loss

    model = Qwen2ForCausalLM.from_pretrained(ASSETS / "language_model")
    assert model.num_parameters() <= 6_000_000
    assert model.config.vocab_size % 128 == 0
    assert heldout_loss(model, SampleMaker(tokenizer), num_chats=50) < 3.5  # ln(640) is 6.5


def test_vision_encoder_loads_and_gives_sixteen_tokens_a_tile() -> None:
    from transformers import InternVLVisionModel

    from nvlm_train.demo.backbones.vision import pixel_shuffle

    model = InternVLVisionModel.from_pretrained(ASSETS / "vision_encoder")
    with torch.no_grad():
        patches = model(torch.zeros(2, 3, 64, 64)).last_hidden_state[:, 1:]
    assert pixel_shuffle(patches).shape == (2, 16, 4 * model.config.hidden_size)


def test_assets_are_small() -> None:
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) < 25_000_000
