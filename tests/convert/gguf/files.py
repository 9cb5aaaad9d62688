"""Writes small GGUF files as llama.cpp's convert_hf_to_gguf.py does, with the writer of the library gguf."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType

from tests.parity.recipes import LANGUAGE

HEADS, GROUPS = LANGUAGE.num_heads, LANGUAGE.num_kv_heads
TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    *sorted(set("abcdefghijklmnopqrstuvwxyz0123456789<>/_|.,?!\u0120\u010a")),
    "th", "the", "\u0120the", "><", "12", "<think>", "[PAD]",
]  # fmt: skip
"""Byte-level: a space is U+0120, a newline U+010A."""
MERGES = ["t h", "th e", "\u0120 the", "> <", "1 2"]
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
KINDS = [
    *([CONTROL] * 3), *([NORMAL] * (len(TOKENS) - 5)), USER_DEFINED, UNUSED,
]  # fmt: skip


def metadata(**changes: Any) -> dict[str, Any]:
    """Returns what a Llama of `LANGUAGE` states. A change to None leaves a key out; `__` stands for a dot."""
    found = {
        "llama.block_count": LANGUAGE.num_layers,
        "llama.context_length": 2048,
        "llama.embedding_length": LANGUAGE.hidden_size,
        "llama.feed_forward_length": LANGUAGE.ffn_hidden_size,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": GROUPS,
        "llama.attention.layer_norm_rms_epsilon": LANGUAGE.norm_eps,
        "llama.rope.freq_base": LANGUAGE.rope_theta,
        "llama.rope.dimension_count": LANGUAGE.hidden_size // HEADS,
        "llama.vocab_size": LANGUAGE.vocab_size,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": KINDS,
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": "{{ messages }}",
    }
    found |= {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in found.items() if value is not None}


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Returns rows as convert_hf_to_gguf.py's `LlamaModel.permute` stores them."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def tensors(model: torch.nn.Module, permute: bool) -> dict[str, np.ndarray]:
    """Returns a transformers model's tensors under llama.cpp's names, spelled out here once more."""
    parts = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    tops = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    found = {}
    for name, tensor in model.state_dict().items():
        stem, kind = name.rsplit(".", 1)
        values = tensor.detach().float().numpy()
        if stem.startswith("model.layers."):
            _, _, layer, part = stem.split(".", 3)
            if permute and parts[part] in ("attn_q", "attn_k"):
                values = permuted(values, HEADS if parts[part] == "attn_q" else GROUPS)
            stem = f"blk.{layer}.{parts[part]}"
        else:
            stem = tops[stem]
        found[f"{stem}.{kind}"] = values
    if model.config.tie_word_embeddings:
        del found["output.weight"]
    return found


def write(
    path: Path,
    arrays: Mapping[str, np.ndarray],
    fields: Mapping[str, Any],
    kind: Callable[[str, np.ndarray], GGMLQuantizationType] | None = None,
    architecture: str = "llama",
) -> Path:
    """Writes a file; `kind` gives the type of each tensor, F32 where there is none."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in fields.items():
        _add(writer, key, value)
    for name, array in arrays.items():
        type_ = kind(name, array) if kind else GGMLQuantizationType.F32
        data = gguf.quants.quantize(np.ascontiguousarray(array), type_)
        writer.add_tensor(name, data, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
