"""Hugging Face's names of a decoder's tensors against global ones (megatron-core's under `language_model.`).

Each row says which Hugging Face tensors one global tensor is made of, and how. `{n}` is the layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nvlm_train.config.schema import LanguageConfig
from nvlm_train.geometry import head_size

Join = Callable[[LanguageConfig, Sequence[Tensor]], Tensor]
Split = Callable[[LanguageConfig, Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class Row:
    """One global tensor, its parts in Hugging Face's checkpoint, and the maps both ways."""

    global_name: str
    parts: tuple[str, ...]
    join: Join
    split: Split


def join_qkv(language: LanguageConfig, parts: Sequence[Tensor]) -> Tensor:
    """Query, key, value projections to megatron-core's order: per KV group its queries, key, value.

    Works on weights [out, H] and biases [out] alike.
    """
    groups = language.num_kv_heads
    by_group = [part.reshape(groups, -1, *part.shape[1:]) for part in parts]
    return torch.cat(by_group, dim=1).flatten(0, 1)


def split_qkv(language: LanguageConfig, joined: Tensor) -> Sequence[Tensor]:
    """The inverse of `join_qkv`."""
    groups = language.num_kv_heads
    head = head_size(language)
    queries = language.num_heads // groups * head
    by_group = joined.reshape(groups, -1, *joined.shape[1:])
    parts = torch.split(by_group, [queries, head, head], dim=1)
    return [part.flatten(0, 1) for part in parts]


def _same(language: LanguageConfig, parts: Sequence[Tensor]) -> Tensor:
    return parts[0]


def _one(language: LanguageConfig, joined: Tensor) -> Sequence[Tensor]:
    return [joined]


def _stack(language: LanguageConfig, parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts))


def _halves(language: LanguageConfig, joined: Tensor) -> Sequence[Tensor]:
    return joined.chunk(2)


def _pad_rows(language: LanguageConfig, parts: Sequence[Tensor]) -> Tensor:
    """Zero rows up to the recipe's vocabulary: Hugging Face tables may be unpadded."""
    missing = language.vocab_size - len(parts[0])
    return torch.nn.functional.pad(parts[0], (0, 0, 0, missing)) if missing > 0 else parts[0]


_LAYER, _HF = "language_model.decoder.layers.{n}.", "model.layers.{n}."
_ATTENTION, _HF_ATTENTION = _LAYER + "self_attention.", _HF + "self_attn."
_QKV = _ATTENTION + "linear_qkv."
ROWS: tuple[Row, ...] = (
    Row("language_model.embedding.word_embeddings.weight", ("model.embed_tokens.weight",), _pad_rows, _one),
    Row(_LAYER + "input_layernorm.weight", (_HF + "input_layernorm.weight",), _same, _one),
    *(
        Row(_QKV + kind, tuple(f"{_HF_ATTENTION}{name}_proj.{kind}" for name in "qkv"), join_qkv, split_qkv)
        for kind in ("weight", "bias")
    ),
    *(
        Row(f"{_ATTENTION}{name}_layernorm.weight", (f"{_HF_ATTENTION}{name}_norm.weight",), _same, _one)
        for name in "qk"
    ),
    Row(_LAYER + "self_attention.linear_proj.weight", (_HF_ATTENTION + "o_proj.weight",), _same, _one),
    Row(_LAYER + "pre_mlp_layernorm.weight", (_HF + "post_attention_layernorm.weight",), _same, _one),
    Row(
        _LAYER + "mlp.linear_fc1.weight",
        (_HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight"),
        _stack,
        _halves,
    ),
    Row(_LAYER + "mlp.linear_fc2.weight", (_HF + "mlp.down_proj.weight",), _same, _one),
    Row("language_model.decoder.final_layernorm.weight", ("model.norm.weight",), _same, _one),
    Row("language_model.output_layer.weight", ("lm_head.weight",), _pad_rows, _one),
)  # fmt: skip


def find_row(global_name: str) -> tuple[Row, tuple[str, ...]] | None:
    """A global name's row and Hugging Face's names of its parts; None for other parts' tensors."""
    for row in ROWS:
        match = re.fullmatch(re.escape(row.global_name).replace(r"\{n\}", r"(\d+)"), global_name)
        if match:
            layer = match.group(1) if match.groups() else ""
            return row, tuple(part.replace("{n}", layer) for part in row.parts)
    return None


def to_hugging_face(language: LanguageConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole global tensors of the language model to Hugging Face's state dict."""
    exported: dict[str, Tensor] = {}
    for name, tensor in state.items():
        found = find_row(name)
        if found is not None:
            row, parts = found
            exported |= dict(zip(parts, row.split(language, tensor), strict=True))
    return exported
