"""Hugging Face's names of a decoder's tensors against global ones (megatron-core's under `language_model.`).

Each row says which rows of which Hugging Face tensors follow each other in a global one. `{n}` is the layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nvlm_train.config.model_schema import LanguageConfig
from nvlm_train.geometry import head_size


@dataclass(frozen=True)
class GlobalSlice:
    """What one rank holds of a global tensor."""

    name: str
    shape: tuple[int, ...]
    """Of the whole."""
    index: tuple[slice, ...]
    """A start and a stop for each dimension."""


@dataclass(frozen=True)
class Run:
    """Rows that follow each other both in a global tensor and in one of its parts."""

    part: int
    """Its number among the parts of the row."""
    start: int
    """The first of them in the part."""
    rows: int


@dataclass(frozen=True)
class Row:
    """One global tensor, its parts in Hugging Face's checkpoint, and how their rows make it."""

    global_name: str
    parts: tuple[str, ...]
    runs: Callable[[LanguageConfig, int], Sequence[Run]]
    """The recipe's group and the number of rows to the runs, in the global tensor's order."""


@dataclass(frozen=True)
class Piece:
    """A slice of one Hugging Face tensor, and where it lies in the slice of the global one."""

    name: str
    index: tuple[slice, ...]
    rows: slice


def _one(language: LanguageConfig, rows: int) -> Sequence[Run]:
    return [Run(0, 0, rows)]


def _stacked(language: LanguageConfig, rows: int) -> Sequence[Run]:
    """Gate and up, one after the other."""
    return [Run(part, 0, rows // 2) for part in (0, 1)]


def _qkv(language: LanguageConfig, rows: int) -> Sequence[Run]:
    """megatron-core's order: per KV group its queries, key, value, of weights and biases alike."""
    groups, head = language.num_kv_heads, head_size(language)
    sizes = (language.num_heads // groups * head, head, head)
    assert rows == groups * sum(sizes), f"{rows} rows of {groups} groups of {sizes}"
    return [
        Run(part, group * size, size) for group in range(groups) for part, size in enumerate(sizes)
    ]


_LAYER, _HF = "language_model.decoder.layers.{n}.", "model.layers.{n}."
_ATTENTION, _HF_ATTENTION = _LAYER + "self_attention.", _HF + "self_attn."
_QKV = _ATTENTION + "linear_qkv."
ROWS: tuple[Row, ...] = (
    Row("language_model.embedding.word_embeddings.weight", ("model.embed_tokens.weight",), _one),
    Row(_LAYER + "input_layernorm.weight", (_HF + "input_layernorm.weight",), _one),
    *(
        Row(_QKV + kind, tuple(f"{_HF_ATTENTION}{name}_proj.{kind}" for name in "qkv"), _qkv)
        for kind in ("weight", "bias")
    ),
    *(
        Row(f"{_ATTENTION}{name}_layernorm.weight", (f"{_HF_ATTENTION}{name}_norm.weight",), _one)
        for name in "qk"
    ),
    Row(_LAYER + "self_attention.linear_proj.weight", (_HF_ATTENTION + "o_proj.weight",), _one),
    Row(_LAYER + "pre_mlp_layernorm.weight", (_HF + "post_attention_layernorm.weight",), _one),
    Row(
        _LAYER + "mlp.linear_fc1.weight",
        (_HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight"),
        _stacked,
    ),
    Row(_LAYER + "mlp.linear_fc2.weight", (_HF + "mlp.down_proj.weight",), _one),
    Row("language_model.decoder.final_layernorm.weight", ("model.norm.weight",), _one),
    Row("language_model.output_layer.weight", ("lm_head.weight",), _one),
)  # fmt: skip


def find_row(global_name: str) -> tuple[Row, tuple[str, ...]] | None:
    """A global name's row and Hugging Face's names of its parts; None for other parts' tensors."""
    for row in ROWS:
        match = re.fullmatch(re.escape(row.global_name).replace(r"\{n\}", r"(\d+)"), global_name)
        if match:
            layer = match.group(1) if match.groups() else ""
            return row, tuple(part.replace("{n}", layer) for part in row.parts)
    return None


def pieces_of(language: LanguageConfig, wanted: GlobalSlice) -> Sequence[Piece] | None:
    """Says which slices of Hugging Face's tensors make up a slice of a global one.

    Together they have each of its rows once. Of a table that the recipe pads, the last rows may be in no
    file.

    Returns:
        None for tensors of other parts of the model.
    """
    found = find_row(wanted.name)
    if found is None:
        return None
    row, parts = found
    first, others = wanted.index[0], wanted.index[1:]
    pieces, begin = [], 0
    for run in row.runs(language, wanted.shape[0]):
        start, stop = max(begin, first.start), min(begin + run.rows, first.stop)
        if start < stop:
            in_part = slice(run.start + start - begin, run.start + stop - begin)
            own = slice(start - first.start, stop - first.start)
            pieces.append(Piece(parts[run.part], (in_part, *others), own))
        begin += run.rows
    return pieces


def to_hugging_face(language: LanguageConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole global tensors of the language model to Hugging Face's state dict."""
    exported: dict[str, list[Tensor]] = {}
    for name, tensor in state.items():
        whole = tuple(slice(0, size) for size in tensor.shape)
        for piece in pieces_of(language, GlobalSlice(name, tuple(tensor.shape), whole)) or ():
            exported.setdefault(piece.name, []).append(tensor[piece.rows])
    # The runs of a part follow each other in the part, too.
    return {name: torch.cat(rows) for name, rows in exported.items()}
