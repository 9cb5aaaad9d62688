"""The 34B template on a SentencePiece-like tokenizer that has Yi's special tokens at Yi's ids."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, normalizers

from nvlm_train.config.model_schema import TokenizerConfig
from nvlm_train.config.schema import TilingConfig
from nvlm_train.data.index.lengths import compute_lengths
from nvlm_train.data.index.reader import ShardReader
from nvlm_train.data.index.shard_index import load_index
from nvlm_train.data.samples.encoder import EncodingSpec, SampleEncoder
from nvlm_train.data.samples.messages import Message
from nvlm_train.data.shards.tar import LocalShard, write_shards
from nvlm_train.errors import ConfigError
from nvlm_train.routes import ROUTES
from nvlm_train.tokens import Tokenizer
from tests.data.conftest import SLOTS, TILE, chat, mixed_samples

BOS, PAD, START, END = 1, 2, 6, 7


def yi_like(directory: Path, bos: str = "<|startoftext|>") -> Path:
    """BPE over characters with bytes to fall back on, a space mark before every text, few merges."""
    special = ["<unk>", bos, "<|endoftext|>", "<r3>", "<r4>", "<r5>", "<|im_start|>", "<|im_end|>"]
    merges = [("a", "s"), ("as", "s"), ("▁", "ass"), ("i", "s"), ("is", "t"), ("ist", "a")]
    merges += [("ista", "n"), ("istan", "t"), ("c", "a"), ("▁", "ca"), ("d", "o"), ("▁", "do")]
    texts = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    texts += [chr(code) for code in range(33, 127)] + ["".join(pair) for pair in merges]
    vocabulary = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    fast = Fast(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    fast.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    fast.add_special_tokens(special)
    fast.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = yi_like(tmp_path_factory.mktemp("yi"))
    return Tokenizer(TokenizerConfig(path=str(path), template="yi"))


@pytest.fixture(scope="module")
def encoder(tokenizer: Tokenizer) -> SampleEncoder:
    spec = EncodingSpec(
        tile_size=TILE, tokens_per_tile=SLOTS, context_tokens_per_tile=SLOTS, routes=ROUTES["d"],
        tiling=TilingConfig(), sequence_length=400, prompts="sft", system_message=None,
        max_image_pixels=10**6,
    )  # fmt: skip
    return SampleEncoder(tokenizer, spec)


def whole(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a finished string, control tokens in it: what a server computes."""
    fast = Fast.from_file(str(Path(tokenizer.config.path) / "tokenizer.json"))
    return list(fast.encode(text, add_special_tokens=False).ids)


def test_ids_are_those_of_the_whole_string(tokenizer: Tokenizer, encoder: SampleEncoder) -> None:
    record = {"conversations": chat("a dog?", "cat")["conversations"] * 2}
    sample = encoder.encode("k", json.dumps(record).encode(), [])
    exchange = "<|im_start|>user\na dog?<|im_end|>\n<|im_start|>assistant\ncat<|im_end|>\n"
    assert sample.token_ids.tolist() == whole(tokenizer, "<|startoftext|>" + exchange * 2)
    assert sample.token_ids[0] == BOS and sample.token_ids.tolist().count(BOS) == 1


def test_the_header_is_four_tokens_and_not_trained(
    tokenizer: Tokenizer, encoder: SampleEncoder
) -> None:
    sample = encoder.encode("k", json.dumps(chat("a dog?", "cat")).encode(), [])
    ids = sample.token_ids.tolist()
    header = [START, *tokenizer.encode("assistant\n")]
    first = len(ids) - 1 - ids[::-1].index(START)
    assert len(header) == 4 and ids[first : first + 4] == header
    # "cat" begins a line, not a text: no space mark before it.
    answer = whole(tokenizer, "<|im_start|>assistant\ncat")[4:]
    assert answer != tokenizer.encode("cat")
    assert sample.label_ids.tolist() == [*answer, END, *tokenizer.encode("\n")]
    assert sample.label_positions[0] == first + 3


def test_thumbnail_tag_and_slots(tokenizer: Tokenizer, encoder: SampleEncoder) -> None:
    sample = encoder.encode("k", json.dumps(chat("<image>\nwhat?", "cat")).encode(), [(96, 40)])
    ids, slots = sample.token_ids.tolist(), [PAD] * SLOTS
    expected = [BOS, START, *tokenizer.encode("user\n<Image><tile_1>"), *slots]
    expected += [*tokenizer.encode("<tile_2>"), *slots]
    expected += [*tokenizer.encode("<tile_global>"), *slots]
    assert ids[: len(expected)] == expected and sample.num_tiles == 3
    labels = set(sample.label_positions.tolist())
    assert not labels & {position - 1 for position in sample.image_positions.tolist()}


def test_a_prompt_ends_where_the_answer_begins(encoder: SampleEncoder) -> None:
    asked = encoder.encode_prompt([Message("user", "a dog?")], [])
    taught = encoder.encode("k", json.dumps(chat("a dog?", "cat")).encode(), [])
    length = len(asked.token_ids)
    assert np.array_equal(asked.token_ids, taught.token_ids[:length])
    assert taught.label_positions[0] == length - 1 and len(asked.label_ids) == 0


def test_stored_lengths_agree(encoder: SampleEncoder, tmp_path: Path) -> None:
    write_shards(mixed_samples(12, "k"), str(tmp_path / "s-%06d.tar"))
    shard = LocalShard(str(tmp_path / "s-000000.tar"))
    reader = ShardReader("s", shard, load_index(shard))
    lengths = compute_lengths(reader, encoder)
    for row in range(12):
        sizes = reader.index.image_sizes(row)
        sample = encoder.encode(reader.key(row), reader.record(row), sizes)
        assert lengths.num_tokens[row] == len(sample.token_ids)
        assert lengths.num_trained[row] == len(sample.label_ids)


def test_templates_have_fingerprints_of_their_own(encoder: SampleEncoder) -> None:
    path = encoder.tokenizer.config.path
    other = SampleEncoder(Tokenizer(TokenizerConfig(path=path)), encoder.spec)
    assert other.fingerprint != encoder.fingerprint


def test_a_tokenizer_without_bos_is_refused(tmp_path: Path) -> None:
    path = yi_like(tmp_path, bos="<s>")
    with pytest.raises(ConfigError, match=r"template=yi begins samples with <\|startoftext\|>"):
        Tokenizer(TokenizerConfig(path=str(path), template="yi"))
