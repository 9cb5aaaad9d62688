"""Small GGUF files to directories: transformers' weights come back, and nothing is passed over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from nvlm_train.cli import main
from nvlm_train.config.model_schema import TokenizerConfig
from nvlm_train.convert.gguf import directory
from nvlm_train.convert.gguf.directory import convert_gguf
from nvlm_train.errors import CheckpointError
from nvlm_train.tokens import Tokenizer
from tests.convert.gguf.files import metadata, tensors, write
from tests.parity.recipes import LANGUAGE


@pytest.fixture(scope="module")
def arrays(llama: torch.nn.Module) -> dict[str, np.ndarray]:
    return tensors(llama, permute=True)


@pytest.fixture(scope="module")
def file(arrays: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "llama.gguf", arrays, metadata())


def converted(file: Path, **arguments: Any) -> Path:
    out = file.parent / "out"
    convert_gguf(file, out, **arguments)
    return out


def assert_same(found: torch.nn.Module, model: torch.nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor, rtol=0, atol=0, msg=name)


def test_weights_and_logits_are_those_of_the_model(
    llama: torch.nn.Module, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = file.parent / "out"
    assert main(["convert", "gguf", str(file), str(out)]) == 0
    assert "LlamaForCausalLM, 4 layers, 64 wide, 4 heads, 2 KV groups" in capsys.readouterr().out
    found = AutoModelForCausalLM.from_pretrained(out).eval()
    assert_same(found, llama)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(found(ids).logits, llama(ids).logits)


def test_rows_of_heads_are_put_in_order(llama: torch.nn.Module, tmp_path: Path) -> None:
    """The control: a file whose rows were never put in pairs gives other weights, with the same shapes."""
    write(tmp_path / "other.gguf", tensors(llama, permute=False), metadata())
    found = load_file(converted(tmp_path / "other.gguf") / "model.safetensors")
    name = "model.layers.0.self_attn.{}_proj.weight"
    assert not torch.equal(found[name.format("q")], llama.state_dict()[name.format("q")])
    assert torch.equal(found[name.format("v")], llama.state_dict()[name.format("v")])


def test_config_is_that_of_the_model(llama: torch.nn.Module, file: Path, tmp_path: Path) -> None:
    convert_gguf(file, tmp_path / "out")
    found = AutoConfig.from_pretrained(tmp_path / "out").to_dict()
    own = {"architectures", "dtype", "transformers_version", "_name_or_path"}
    ids = {"bos_token_id", "eos_token_id", "pad_token_id"}
    for key, value in llama.config.to_dict().items():
        if key not in own | ids:
            assert found[key] == value, key
    assert [found[key] for key in sorted(ids)] == [1, 2, 2]
    # A float of 32 bits in the file, the number that was meant in config.json.
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rms_norm_eps"] == 1e-6


def test_tied_tables_are_stored_once(llama_3: torch.nn.Module, tmp_path: Path) -> None:
    fields = metadata(
        llama__attention__key_length=24,
        llama__attention__value_length=24,
        llama__rope__dimension_count=24,
    )
    path = write(tmp_path / "tied.gguf", tensors(llama_3, permute=True), fields)
    out = converted(path)
    assert "lm_head.weight" not in load_file(out / "model.safetensors")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True
    assert_same(AutoModelForCausalLM.from_pretrained(out), llama_3)


def test_qwen2_has_biases_and_its_rows_in_order(qwen2: torch.nn.Module, tmp_path: Path) -> None:
    fields = {key.replace("llama.", "qwen2."): value for key, value in metadata().items()}
    fields["tokenizer.ggml.pre"] = "qwen2"
    arrays = tensors(qwen2, permute=False)
    out = converted(write(tmp_path / "qwen2.gguf", arrays, fields, architecture="qwen2"))
    assert_same(AutoModelForCausalLM.from_pretrained(out), qwen2)


def test_quantised_tensors_become_their_values(
    llama: torch.nn.Module, arrays: dict[str, np.ndarray], tmp_path: Path
) -> None:
    def kind(name: str, array: np.ndarray) -> GGMLQuantizationType:
        if array.ndim == 1:
            return GGMLQuantizationType.F32
        return GGMLQuantizationType.Q8_0 if "embd" in name else GGMLQuantizationType.Q4_1

    path = write(tmp_path / "q4.gguf", arrays, metadata(), kind)
    found = load_file(converted(path) / "model.safetensors")
    stored = gguf.quants.quantize(arrays["blk.1.ffn_up.weight"], GGMLQuantizationType.Q4_1)
    values = gguf.quants.dequantize(stored, GGMLQuantizationType.Q4_1)
    up = found["model.layers.1.mlp.up_proj.weight"]
    assert up.dtype == torch.float32 and np.array_equal(up.numpy(), values)
    # Four bits: near the weights and not equal to them.
    error = (up - llama.state_dict()["model.layers.1.mlp.up_proj.weight"]).abs()
    assert 0 < error.mean() < 0.02


def test_several_files_have_an_index(
    llama: torch.nn.Module, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory, "FILE_BYTES", 200_000)
    convert_gguf(file, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), llama)


def test_rope_factors_of_llama_3_become_its_parameters(
    llama: torch.nn.Module, arrays: dict[str, np.ndarray], tmp_path: Path
) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    stretch = {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_theta": LANGUAGE.rope_theta,
    }  # fmt: skip
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16}
    stretched = LlamaRotaryEmbedding(LlamaConfig(**sizes, rope_parameters=stretch)).inv_freq
    plain = 1 / LANGUAGE.rope_theta ** (torch.arange(0, 16, 2) / 16)
    factors = {"rope_freqs.weight": (plain / stretched).numpy().astype(np.float32)}
    out = converted(write(tmp_path / "llama3.gguf", arrays | factors, metadata()))
    config = AutoConfig.from_pretrained(out)
    torch.testing.assert_close(LlamaRotaryEmbedding(config).inv_freq, stretched)
    factors["rope_freqs.weight"] = factors["rope_freqs.weight"] * 1.5
    path = write(tmp_path / "other.gguf", arrays | factors, metadata())
    with pytest.raises(CheckpointError, match="not that of Llama 3.1"):
        convert_gguf(path, tmp_path / "other")


def test_positions_that_are_interpolated(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    fields = metadata(llama__rope__scaling__type="linear", llama__rope__scaling__factor=4.0)
    config = AutoConfig.from_pretrained(converted(write(tmp_path / "x.gguf", arrays, fields)))
    assert config.rope_parameters["rope_type"] == "linear" and config.rope_parameters["factor"] == 4


def test_the_tokenizer_splits_as_its_name_says(file: Path, tmp_path: Path) -> None:
    convert_gguf(file, tmp_path / "out")
    ours = Tokenizer(TokenizerConfig(path=str(tmp_path / "out")))
    names = ours.vocabulary
    words = {number: token for token, number in names.items()}

    def pieces(text: str) -> list[str]:
        return [words[number] for number in ours.encode(text)]

    assert pieces("the then") == ["the", "\u0120the", "n"]
    # SmolLM2's digits stand alone, though 12 is a token; a control token in text is text.
    assert pieces("12") == ["1", "2"]
    assert "<|im_end|>" not in pieces("a<|im_end|>") and ours.decode(ours.encode("<|im_end|>"))
    assert pieces("<Image><tile_1>"[6:]) == ["><", "t", "i", "l", "e", "_", "1", ">"]
    assert pieces("a<think>") == ["a", "<think>"]
    assert "[PAD]" not in names and (ours.pad, ours.turn_start, ours.turn_end) == (0, 1, 2)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == (
        "<|im_start|>", "<|im_end|>", "<|im_end|>",
    )  # fmt: skip
    assert theirs.chat_template == "{{ messages }}"
    assert theirs("the<|im_end|>")["input_ids"] == [names["the"], 2]


def test_a_text_begins_as_the_file_says(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    fields = metadata(tokenizer__ggml__pre="llama-bpe", tokenizer__ggml__add_bos_token=True)
    out = converted(write(tmp_path / "x.gguf", arrays, fields))
    theirs = AutoTokenizer.from_pretrained(out)
    # Llama 3 keeps up to three digits together.
    assert theirs("12")["input_ids"] == [1, theirs.convert_tokens_to_ids("12")]


def test_the_models_own_tokenizer_is_copied(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    own = tmp_path / "tokenizer.json"
    own.write_text("{}")
    path = write(tmp_path / "x.gguf", arrays, metadata(tokenizer__ggml__model="llama"))
    assert (converted(path, tokenizer=own) / "tokenizer.json").read_text() == "{}"


def dropped(arrays: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    return {key: value for key, value in arrays.items() if key != name}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"llama__attention__sliding_window": 512}, "has llama.attention.sliding_window=512, which may"),
        ({"llama__expert_count": 8}, "has llama.expert_count=8, which may change"),
        ({"llama__attention__head_count": None}, "lacks llama.attention.head_count"),
        ({"llama__attention__head_count_kv": 3}, "head_count_kv=3, which does not divide head_count=4"),
        ({"llama__attention__head_count_kv": 4}, "blk.0.attn_k.weight has the shape"),
        ({"llama__attention__head_count_kv": [2, 2, 1, 2]}, "layers that differ"),
        ({"llama__rope__dimension_count": 8}, "rope.dimension_count=8, but heads of 16 channels"),
        ({"llama__rope__scaling__type": "yarn"}, "scaling.type=yarn, none and linear are converted"),
        ({"llama__rope__scaling__type": "linear"}, "lacks llama.rope.scaling.factor"),
        ({"llama__vocab_size": 255}, "vocab_size=255, but token_embd.weight has 256 rows"),
        ({"llama__block_count": 3}, "has a tensor blk.3."),
        ({"llama__block_count": 5}, "lacks 9 tensors, blk.4.attn_norm.weight first"),
        ({"llama__embedding_length": 0}, "hidden_size=0 must be at least 1"),
        ({"general__architecture": "gemma"}, "general.architecture=gemma, llama and qwen2 are converted"),
        ({"split__count": 3}, "split.count=3 parts; join them"),
        ({"tokenizer__ggml__model": "llama"}, "ggml.model=llama, byte-level BPE .* --tokenizer FILE"),
        ({"tokenizer__ggml__pre": "tekken"}, "ggml.pre=tekken, texts are split as gpt-2, smollm"),
        ({"tokenizer__ggml__merges": ["t q"]}, "merges 't q', which are no two tokens that"),
        ({"tokenizer__ggml__token_type": [1]}, "tokens but 1 types"),
        ({"tokenizer__ggml__tokens": None}, "lacks the list tokenizer.ggml.tokens"),
    ],
    ids=str,
)  # fmt: skip
def test_what_would_be_wrong_is_named(
    arrays: dict[str, np.ndarray], tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    found = metadata(**fields)
    architecture = found.pop("general.architecture", "llama")
    path = write(tmp_path / "bad.gguf", arrays, found, architecture=architecture)
    with pytest.raises(CheckpointError, match=message):
        convert_gguf(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tensor_too_few_or_too_many(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    path = write(tmp_path / "few.gguf", dropped(arrays, "blk.2.ffn_up.weight"), metadata())
    with pytest.raises(CheckpointError, match="lacks 1 tensors, blk.2.ffn_up.weight first"):
        convert_gguf(path, tmp_path / "out")
    more = arrays | {"blk.0.attn_q_norm.weight": np.ones(16, np.float32)}
    with pytest.raises(CheckpointError, match="has a tensor blk.0.attn_q_norm.weight"):
        convert_gguf(write(tmp_path / "more.gguf", more, metadata()), tmp_path / "out")
    path = write(tmp_path / "none.gguf", dropped(arrays, "token_embd.weight"), metadata())
    with pytest.raises(CheckpointError, match="lacks the tensor token_embd.weight"):
        convert_gguf(path, tmp_path / "out")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.3, 0.999])
def test_a_cut_file(file: Path, tmp_path: Path, share: float) -> None:
    whole = file.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match="is no whole GGUF file"):
        convert_gguf(tmp_path / "cut.gguf", tmp_path / "out")


def test_arguments(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    for arguments, message in (
        ([file, tmp_path / "out"], "is there already; remove it"),
        ([tmp_path / "no.gguf", tmp_path / "x"], "no.gguf: no such file"),
        ([file, tmp_path / "x", "--tokenizer", tmp_path / "no.json"], "--tokenizer="),
    ):
        assert main(["convert", "gguf", *map(str, arguments)]) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "out" / "mine").exists() and not (tmp_path / "x").exists()
