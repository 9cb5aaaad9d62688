"""ChatML ids by hand, image slots, labels, tile limits, truncation; stored lengths agree."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nvlm_train.batch import SampleInfo
from nvlm_train.config.schema import TilingConfig
from nvlm_train.data.index.lengths import compute_lengths, load_lengths
from nvlm_train.data.index.reader import ShardReader
from nvlm_train.data.index.shard_index import load_index
from nvlm_train.data.loading.collate import pack_samples
from nvlm_train.data.samples.encoded import EncodedSample
from nvlm_train.data.samples.encoder import SampleEncoder
from nvlm_train.data.samples.messages import Message
from nvlm_train.data.shards.tar import LocalShard, write_shards
from nvlm_train.tokens import Tokenizer
from tests.data.conftest import LENGTH, SLOTS, chat, draw_image, encoded, mixed_samples

Make = Callable[..., SampleEncoder]


def encode(
    encoder: SampleEncoder, question: str, answer: str, *sizes: tuple[int, int]
) -> EncodedSample:
    return encoder.encode("key", json.dumps(chat(question, answer)).encode(), sizes)


def test_text_only_chat_by_hand(make_encoder: Make, tokenizer: Tokenizer) -> None:
    sample = encode(make_encoder(system_message="Be kind."), "dog?", "cat")
    start, end, newline = [tokenizer.turn_start], [tokenizer.turn_end], tokenizer.encode("\n")
    context = [
        *start, *tokenizer.encode("system\nBe kind."), *end, *newline,
        *start, *tokenizer.encode("user\ndog?"), *end, *newline,
        *start, *tokenizer.encode("assistant\n"),
    ]  # fmt: skip
    trained = [*tokenizer.encode("cat"), *end, *newline]
    assert sample.token_ids.tolist() == context + trained
    assert sample.label_ids.tolist() == trained
    assert sample.label_positions.tolist() == [len(context) - 1 + n for n in range(len(trained))]
    assert sample.num_tiles == 0 and len(sample.image_positions) == 0


def test_tiles_and_tags_by_hand(make_encoder: Make, tokenizer: Tokenizer) -> None:
    sample = encode(make_encoder(), "<image>\nwhat?", "cat", (96, 40))
    slots = [tokenizer.pad] * SLOTS
    expected = [tokenizer.turn_start, *tokenizer.encode("user\n<Image><tile_1>"), *slots]
    expected += [*tokenizer.encode("<tile_2>"), *slots]
    expected += [*tokenizer.encode("<tile_global_thumbnail>"), *slots]
    expected += [*tokenizer.encode("</Image>\nwhat?"), tokenizer.turn_end, *tokenizer.encode("\n")]
    assert sample.grids == ((2, 1),) and sample.tiles_per_image == (3,)
    assert sample.token_ids.tolist()[: len(expected)] == expected
    assert (sample.token_ids[sample.image_positions] == tokenizer.pad).all()
    assert len(sample.image_positions) == 3 * SLOTS
    # `><` is one token of this tokenizer, as it is of Qwen's: the first tag merges with <Image>.
    assert len(tokenizer.encode("<Image><tile_1>")) < len(
        tokenizer.encode("<Image>") + tokenizer.encode("<tile_1>")
    )


def test_one_tile_has_the_thumbnail_tag_and_none_has_no_tag(
    make_encoder: Make, tokenizer: Tokenizer
) -> None:
    tagged = encode(make_encoder(), "<image>", "cat", (20, 20))
    head = [tokenizer.turn_start, *tokenizer.encode("user\n<Image><tile_global_thumbnail>")]
    assert tagged.token_ids.tolist()[: len(head)] == head and tagged.num_tiles == 1
    plain = encode(make_encoder(tiling=TilingConfig(tags="none")), "<image>", "cat", (96, 40))
    head = [tokenizer.turn_start, *tokenizer.encode("user\n<Image>"), *[tokenizer.pad] * 3 * SLOTS]
    assert plain.token_ids.tolist()[: len(head)] == head


def test_no_label_on_or_before_an_image(make_encoder: Make) -> None:
    sample = encode(make_encoder(), "<image> and <image>?", "cat " * 4, (96, 40), (20, 20))
    images = set(sample.image_positions.tolist())
    labels = set(sample.label_positions.tolist())
    assert not labels & images and not {position - 1 for position in images} & labels


def test_special_text_in_data_is_text(make_encoder: Make, tokenizer: Tokenizer) -> None:
    sample = encode(make_encoder(), "<|im_end|><|endoftext|>", "<|im_start|>")
    ids = sample.token_ids.tolist()
    assert ids.count(tokenizer.turn_start) == 2 and ids.count(tokenizer.turn_end) == 2
    assert tokenizer.pad not in ids


def test_several_answers_are_all_trained(make_encoder: Make, tokenizer: Tokenizer) -> None:
    record = {
        "conversations": chat("q", "cat")["conversations"] + chat("r", "dog")["conversations"]
    }
    sample = make_encoder().encode("key", json.dumps(record).encode(), [])
    end = [tokenizer.turn_end, *tokenizer.encode("\n")]
    assert sample.label_ids.tolist() == [
        *tokenizer.encode("cat"), *end, *tokenizer.encode("dog"), *end
    ]  # fmt: skip


def test_fewer_tiles_when_it_would_not_fit(make_encoder: Make) -> None:
    size = (192, 128)
    full = encode(make_encoder(sequence_length=1000), "<image>", "cat", size)
    assert full.tiles_per_image == (7,)
    tiles = []
    for length in range(len(full.token_ids), 10, -1):
        try:
            sample = encode(make_encoder(sequence_length=length), "<image>", "cat", size)
        except ValueError:
            break
        assert len(sample.token_ids) <= length
        tiles.append(sample.num_tiles)
    # Limits 6, 4, 2, 1 make the grids 3x2, 2x2, 2x1, 1x1.
    assert list(dict.fromkeys(tiles)) == [7, 5, 3, 1]


def test_truncation_keeps_what_is_left_of_the_answer(make_encoder: Make) -> None:
    sample = encode(make_encoder(sequence_length=40), "what?", "word " * 60)
    assert sample.is_truncated and len(sample.token_ids) == 40
    assert sample.label_positions[-1] == 38
    assert np.array_equal(sample.label_ids, sample.token_ids[sample.label_positions + 1])


def test_all_labels_masked(make_encoder: Make) -> None:
    message = "every label is masked: the answer lies behind sequence_length=20; "
    with pytest.raises(ValueError, match=message):
        encode(make_encoder(sequence_length=20), "what? " * 30, "cat")
    record = json.dumps({"messages": [{"role": "user", "content": "hello"}]}).encode()
    with pytest.raises(
        ValueError, match="every label is masked: the conversation has no assistant"
    ):
        make_encoder().encode("key", record, [])


def test_images_that_do_not_fit(make_encoder: Make) -> None:
    with pytest.raises(ValueError, match="images do not fit: with one tile each, 9 images reach"):
        encode(make_encoder(), "<image>" * 9, "cat", *[(20, 20)] * 9)


def test_bomb_is_refused_by_its_header(make_encoder: Make) -> None:
    with pytest.raises(ValueError, match="image is too large: width=2000 x height=2000"):
        encode(make_encoder(), "<image>", "cat", (2000, 2000))


def test_prompt_is_the_sample_up_to_its_answer(make_encoder: Make) -> None:
    encoder = make_encoder(system_message="Be kind.")
    sample = encode(encoder, "<image>\nwhat?", "cat", (96, 40))
    prompt = encoder.encode_prompt([Message("user", "what?")], [(96, 40)])
    assert prompt.token_ids.tolist() == sample.token_ids[: sample.label_positions[0] + 1].tolist()
    assert len(prompt.label_ids) == 0 and prompt.grids == sample.grids


def test_pack(make_encoder: Make, tokenizer: Tokenizer) -> None:
    encoder = make_encoder()
    samples = [encode(encoder, "<image> what?", "cat", (20, 20)), encode(encoder, "q", "dog")]
    infos = [SampleInfo(0, "shard", key) for key in ("x", "y")]
    pack = pack_samples(samples, infos, LENGTH, tokenizer.pad)
    first, second = (len(sample.token_ids) for sample in samples)
    assert pack.cu_seqlens.tolist() == [0, first, first + second, LENGTH]
    assert pack.token_ids_S[pack.label_positions_L + 1].equal(pack.label_ids_L)
    assert pack.label_samples_L.bincount().tolist() == [len(s.label_ids) for s in samples]
    assert (pack.token_ids_S[first + second :] == tokenizer.pad).all() and pack.num_tiles == 1
    exact = pack_samples(samples, infos, first + second, tokenizer.pad)
    assert exact.cu_seqlens.tolist() == [0, first, first + second]
    empty = pack_samples([], [], LENGTH, tokenizer.pad)
    assert empty.cu_seqlens.tolist() == [0, LENGTH] and empty.num_tiles == 0
    with pytest.raises(ValueError, match="do not fit a pack of 5"):
        pack_samples(samples, infos, 5, tokenizer.pad)


def reader_of(path: Path) -> ShardReader:
    shard = LocalShard(str(path))
    return ShardReader(path.name, shard, load_index(shard))


def test_lengths_agree_with_the_encoding(tmp_path: Path, make_encoder: Make) -> None:
    samples = mixed_samples(40, "k")
    samples.append(("long", chat("what?", "word " * 200), []))
    samples.append(
        ("wide", chat("<image>", "word " * 10), [("png", encoded(draw_image(192, 128), "PNG"))])
    )
    samples.append(("marker", chat("<image>", "cat"), []))
    write_shards(samples, str(tmp_path / "s-%06d.tar"))
    reader, encoder = reader_of(tmp_path / "s-000000.tar"), make_encoder()
    lengths = compute_lengths(reader, encoder)
    assert {reader.key(row): reason for row, reason in lengths.reasons.items()} == {
        "marker": "image marker without image: the text has 1 <image> and the sample has 0 images; "
        "add the image members or remove the markers"
    }
    for row in range(len(samples) - 1):
        sample = encoder.encode(reader.key(row), reader.record(row), reader.index.image_sizes(row))
        assert lengths.num_tokens[row] == len(sample.token_ids) <= LENGTH
        assert lengths.num_tiles[row] == sample.num_tiles
        assert lengths.num_trained[row] == len(sample.label_ids)
        assert lengths.is_truncated[row] == sample.is_truncated
    assert lengths.is_truncated.sum() == 1


def test_lengths_are_cached_per_encoding(
    tmp_path: Path, make_encoder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(mixed_samples(8, "k"), str(tmp_path / "s-%06d.tar"))
    reader = reader_of(tmp_path / "s-000000.tar")
    first = load_lengths(reader, make_encoder())
    load_lengths(reader, make_encoder(prompts="pretrain"))
    assert len(list(tmp_path.glob("*.lengths-*"))) == 2
    monkeypatch.setattr("nvlm_train.data.index.lengths.compute_lengths", None)
    again = load_lengths(reader, make_encoder())
    assert np.array_equal(first.num_tokens, again.num_tokens) and again.reasons == first.reasons
