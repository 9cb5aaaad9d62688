"""Cross-entropy of trained tokens with the output layer's product inside: never all logits at once.

The vocabulary is taken in chunks. Forward computes the logits of one chunk, reads of them what softmax
needs (the largest, the sum of exponentials, the label's own), and makes the next in their place. Backward
computes them again, turns them into gradients where they stand, and multiplies on. Chunks of the
vocabulary instead of tokens mean that each row of the table's fp32 gradient is read and written once,
and that tensor-parallel ranks exchange as few messages as without chunks. The chunk that forward came to
last is kept: of a vocabulary that is one chunk, nothing is computed twice.

Numbers are those of megatron-core's `vocab_parallel_cross_entropy` on all logits; with one chunk bit for
bit on one rank. A chunk's logits and the table's gradient are what the factors' dtype says, all else is
fp32.

Shape legend: L trained tokens, H hidden, V this rank's rows of the vocabulary, C rows of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import layers
from torch import Tensor

from nvlm_train.parallel import kernels
from nvlm_train.parallel.weight_gradient import add_product

CHUNK_ELEMENTS = 2**24
"""Logits of a chunk: 8,192 rows at 2,048 tokens, 32 MiB in bf16, which an H100's second cache holds."""

ROWS_ALIGNED = 128
"""Chunks have a multiple of so many rows, for the tiles of matrix products."""


@dataclass(frozen=True)
class VocabularyShard:
    """Says which rows of the vocabulary this tensor-parallel rank has."""

    first: int
    """Id of its first row."""
    rows: int
    """Rows that are no padding; the table may have more."""
    group: dist.ProcessGroup
    """The tensor-parallel ranks."""
    fuses_gradient: bool
    """Whether the table's gradient goes to `main_grad` at once; otherwise autograd gets it."""


class Softmax(NamedTuple):
    """Holds what is known of each token's softmax. Every tensor is fp32 [L]."""

    largest: Tensor
    total: Tensor
    """Sum of exp(logit - largest)."""
    wanted: Tensor
    """The label's logit; zero where its row is elsewhere."""


def token_losses(
    hidden_LH: Tensor, table_VH: Tensor, labels_L: Tensor, shard: VocabularyShard
) -> Tensor:
    """Computes each token's cross-entropy, fp32 [L]; the same on every tensor-parallel rank.

    Args:
        hidden_LH: fp32 or bf16, whole on every tensor-parallel rank. Its gradient is summed over them.
        table_VH: this rank's rows, of the same dtype.
        labels_L: int64, ids of the whole vocabulary.
        shard: which rows those are.
    """
    losses: Tensor = _TokenLosses.apply(hidden_LH, table_VH, labels_L, shard)
    return losses


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden_LH: Tensor, table_VH: Tensor, labels_L: Tensor, shard: VocabularyShard
    ) -> Tensor:
        read, _ = _elementwise(hidden_LH)
        known, logits_LC = None, None
        for start, stop in _chunks(len(labels_L), shard.rows):
            logits_LC = torch.mm(hidden_LH, table_VH[start:stop].t())
            known = read(logits_LC, labels_L - (shard.first + start), known)
        softmax = _over_ranks(known or _nothing_read(hidden_LH), shard.group)
        ctx.shard, ctx.table = shard, table_VH
        ctx.last_LC = logits_LC if any(ctx.needs_input_grad) else None
        ctx.save_for_backward(hidden_LH, table_VH, labels_L, *softmax)
        return softmax.total.log() - (softmax.wanted - softmax.largest)

    @staticmethod
    def backward(ctx: Any, grad_L: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # type: ignore[override]
        shard: VocabularyShard = ctx.shard
        hidden_LH, table_VH, labels_L, *known = ctx.saved_tensors
        needs_hidden, needs_table, *_ = ctx.needs_input_grad
        _, turn = _elementwise(hidden_LH)
        chunks = list(_chunks(len(labels_L), shard.rows))
        of_hidden = _Sum(hidden_LH, len(chunks)) if needs_hidden else None
        of_table = _TableGradient(ctx.table, shard.fuses_gradient) if needs_table else None
        logits_LC, ctx.last_LC = ctx.last_LC, None
        for start, stop in reversed(chunks):
            rows_CH = table_VH[start:stop]
            if logits_LC is None:
                logits_LC = torch.mm(hidden_LH, rows_CH.t())
            place_L = labels_L - (shard.first + start)
            turn(logits_LC, place_L, Softmax(*known), grad_L)
            if of_hidden is not None:
                of_hidden.add(logits_LC, rows_CH)
            if of_table is not None:
                of_table.add(start, stop, logits_LC, hidden_LH)
            logits_LC = None
        grad_hidden = None if of_hidden is None else of_hidden.value()
        if grad_hidden is not None and shard.group.size() > 1:
            dist.all_reduce(grad_hidden, group=shard.group)
        return grad_hidden, None if of_table is None else of_table.value(), None, None


def _chunks(tokens: int, rows: int) -> Iterator[tuple[int, int]]:
    """Yields ranges of rows of about equal size, so that a chunk has at most `CHUNK_ELEMENTS` logits."""
    count = -(-rows * tokens // CHUNK_ELEMENTS)
    size = -(-rows // (ROWS_ALIGNED * count)) * ROWS_ALIGNED if count else 0
    for start in range(0, rows, size or 1):
        yield start, min(start + size, rows)


def _nothing_read(like: Tensor) -> Softmax:
    """Returns the start, which is all that a rank has whose rows are all padding."""
    zeros_L = like.new_zeros(len(like), dtype=torch.float32)
    return Softmax(torch.full_like(zeros_L, float("-inf")), zeros_L, zeros_L)


def _over_ranks(own: Softmax, group: dist.ProcessGroup) -> Softmax:
    """Joins what the ranks read of their rows."""
    if group.size() == 1:
        return own
    largest_L = own.largest.clone()
    dist.all_reduce(largest_L, op=dist.ReduceOp.MAX, group=group)
    sums = torch.stack([own.total * (own.largest - largest_L).exp(), own.wanted])
    dist.all_reduce(sums, group=group)
    return Softmax(largest_L, *sums.unbind())


# ---- what is done to a chunk's logits ----


def _elementwise(like: Tensor) -> tuple[Callable[..., Softmax], Callable[..., None]]:
    """Returns what reads a chunk and what turns it. On CUDA each is compiled, or it would be ten kernels."""
    if not like.is_cuda:
        return _read, _turn
    return kernels.compiled(_read), kernels.compiled(_turn_in_one)


def _read(logits_LC: Tensor, place_L: Tensor, before: Softmax | None) -> Softmax:
    """Reads a chunk's logits.

    Args:
        logits_LC: of the chunk.
        place_L: the label's row in the chunk; outside of it when it has another chunk's.
        before: what was read of the chunks before; None at the first.
    """
    values_LC = logits_LC.float()
    largest_L = values_LC.amax(dim=-1)
    total_L = (values_LC - largest_L[:, None]).exp_().sum(dim=-1)
    at_L, is_here_L = _in_chunk(place_L, logits_LC)
    wanted_L = values_LC.gather(1, at_L[:, None])[:, 0].where(is_here_L, 0.0)
    if before is None:
        return Softmax(largest_L, total_L, wanted_L)
    both_L = torch.maximum(largest_L, before.largest)
    total_L = total_L * (largest_L - both_L).exp()
    total_L = total_L + before.total * (before.largest - both_L).exp()
    return Softmax(both_L, total_L, wanted_L + before.wanted)


def _turn(logits_LC: Tensor, place_L: Tensor, softmax: Softmax, grad_L: Tensor) -> None:
    """Turns logits into their gradients, in place and in as few new tensors as can be without a compiler."""
    values_LC = logits_LC.float()
    values_LC.sub_(softmax.largest[:, None]).exp_().div_(softmax.total[:, None])
    at_L, is_here_L = _in_chunk(place_L, logits_LC)
    values_LC.scatter_add_(1, at_L[:, None], -is_here_L[:, None].float())
    values_LC.mul_(grad_L[:, None])
    logits_LC.copy_(values_LC)


def _turn_in_one(logits_LC: Tensor, place_L: Tensor, softmax: Softmax, grad_L: Tensor) -> None:
    """Does what `_turn` does by nothing but elementwise operations, which compile to one kernel."""
    values_LC = (logits_LC.float() - softmax.largest[:, None]).exp() / softmax.total[:, None]
    columns_C = torch.arange(logits_LC.shape[1], device=logits_LC.device)
    is_label_LC = columns_C == place_L[:, None]
    logits_LC.copy_((values_LC - is_label_LC.float()) * grad_L[:, None])


def _in_chunk(place_L: Tensor, logits_LC: Tensor) -> tuple[Tensor, Tensor]:
    """Returns each label's row, moved into the chunk, and whether it was there."""
    size = logits_LC.shape[1]
    return place_L.clamp(0, size - 1), (place_L >= 0) & (place_L < size)


# ---- gradients ----


class _Sum:
    """Adds up the gradient of hidden states over chunks, in fp32."""

    def __init__(self, hidden_LH: Tensor, num_chunks: int) -> None:
        self._like, self._is_one = hidden_LH, num_chunks == 1
        self._total: Tensor | None = None

    def add(self, grad_LC: Tensor, rows_CH: Tensor) -> None:
        if self._is_one:
            self._total = torch.mm(grad_LC, rows_CH)
            return
        if self._total is None:
            self._total = torch.zeros_like(self._like, dtype=torch.float32)
        add_product(self._total, grad_LC, rows_CH)

    def value(self) -> Tensor:
        """Returns the sum in the dtype of the hidden states."""
        if self._total is None:
            return torch.zeros_like(self._like)
        return self._total.to(self._like.dtype)


class _TableGradient:
    """Takes the table's gradient by chunks of rows: into `main_grad`, or into a tensor for autograd."""

    def __init__(self, table_VH: Tensor, fuses: bool) -> None:
        self._table = table_VH
        self._main_grad: Tensor | None = getattr(table_VH, "main_grad", None) if fuses else None
        # Zeros, because nobody visits the rows of padding.
        self._own = None if self._main_grad is not None else torch.zeros_like(table_VH)

    def add(self, start: int, stop: int, grad_LC: Tensor, hidden_LH: Tensor) -> None:
        if self._own is not None:
            torch.mm(grad_LC.t(), hidden_LH, out=self._own[start:stop])
            return
        assert self._main_grad is not None
        kernel = layers.fused_weight_gradient_mlp_cuda
        kernel.wgrad_gemm_accum_fp32(hidden_LH, grad_LC, self._main_grad[start:stop])

    def value(self) -> Tensor | None:
        """Returns what autograd gets, as megatron-core's linears do.

        Its hook on a parameter must see a gradient to know that the parameter is done, and does not read
        it when `grad_added_to_main_grad` is set. So it gets one that takes no memory: bytes of `main_grad`.
        Where the table is the embedding's, whose backward brings a gradient that is read, there is none.
        """
        if self._own is not None:
            return self._own
        assert self._main_grad is not None
        if hasattr(self._table, "grad_added_to_main_grad"):
            self._table.grad_added_to_main_grad = True
            if not getattr(self._table, "zero_out_wgrad", False):
                return _unread(self._main_grad, self._table)
        return None


def _unread(main_grad_VH: Tensor, table_VH: Tensor) -> Tensor:
    numbers = main_grad_VH.view(table_VH.dtype).flatten()
    return numbers[: table_VH.numel()].view_as(table_VH)
