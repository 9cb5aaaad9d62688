"""Cross-attention on CPUs as one function: span by span forward and backward, on views.

Composed by autograd, every span is cut out of queries, keys and values, and its gradients are padded to
the size of the whole and summed. Here segments are views, and what the kernels return is written once where
it belongs.

Shape legend: S tokens of a pack, C tokens of its context, N local heads, G local KV groups, D head size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nvlm_train.device_batch import Spans
from nvlm_train.model.attention.segments import Scores, attend_segment, attend_segment_backward


class Run(NamedTuple):
    """Spans of one shape that follow each other on both sides, such as an image's tags: one batch."""

    start: int
    """Of its tokens, in the pack."""
    rows: int
    """Tokens of a span."""
    first: int
    """Of its keys, in the context."""
    columns: int
    """Keys of a span."""
    number: int
    """Spans."""

    @property
    def next_span(self) -> Run:
        """The span that would join these."""
        return self._replace(
            start=self.start + self.number * self.rows,
            first=self.first + self.number * self.columns,
            number=1,
        )

    def of_tokens(self, states: Tensor) -> Tensor:
        """Returns the spans' tokens of [S, heads, D] as a view, [number, heads, rows, D]."""
        return _cut(states, self.start, self.number, self.rows)

    def of_context(self, states: Tensor) -> Tensor:
        """Returns the spans' keys or values of [C, heads, D] as a view, [number, heads, columns, D]."""
        return _cut(states, self.first, self.number, self.columns)


def _cut(states: Tensor, start: int, number: int, size: int) -> Tensor:
    row, head, channel = states.stride()
    shape = (number, states.shape[1], size, states.shape[2])
    # One call where a slice, a view and a transposition would be three.
    offset = states.storage_offset() + start * row
    return states.as_strided(shape, (size * row, head, row, channel), offset)


def runs_of(spans: Spans) -> Iterator[Run]:
    """Joins spans, ascending and disjoint in their tokens, to runs.

    A span without tokens stays: composed by autograd, its keys and values have gradients, of zeros.
    """
    open_run: Run | None = None
    for start, stop, first, last in spans:
        run = Run(start, stop - start, first, last - first, 1)
        if open_run is None:
            open_run = run
            continue
        if run == open_run.next_span:
            open_run = open_run._replace(number=open_run.number + 1)
            continue
        yield open_run
        open_run = run
    if open_run is not None:
        yield open_run


def attend_spans(
    query_SND: Tensor, key_CGD: Tensor, value_CGD: Tensor, runs: tuple[Run, ...]
) -> Tensor:
    """Lets each run's tokens attend to its part of the context, without dropout.

    Args:
        query_SND: [S, N, D].
        key_CGD: [C, G, D].
        value_CGD: [C, G, D].
        runs: of the spans.

    Returns:
        [S, N, D], contiguous; zero outside the spans.
    """
    asking = tuple(run for run in runs if run.rows)
    attended: Tensor = _OfSpans.apply(query_SND, key_CGD, value_CGD, asking)
    return attended


class _OfSpans(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, query_SND: Tensor, key_CGD: Tensor, value_CGD: Tensor, runs: tuple[Run, ...]
    ) -> Tensor:
        output_SND = torch.zeros_like(query_SND, memory_format=torch.contiguous_format)
        saved = []
        for run in runs:
            states = (run.of_tokens(query_SND), run.of_context(key_CGD), run.of_context(value_CGD))
            output, logsumexp = attend_segment(*states, Scores())
            run.of_tokens(output_SND).copy_(output)
            saved += [*states, output, logsumexp]
        ctx.save_for_backward(*saved)
        ctx.runs, ctx.context = runs, key_CGD.shape
        return output_SND

    @staticmethod
    def backward(ctx: Any, grad_SND: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        saved = iter(ctx.saved_tensors)
        of_query_SND = torch.zeros_like(grad_SND)
        length, groups, channels = ctx.context
        of_context = grad_SND.new_zeros(length, groups, 2, channels)
        of_key, of_value = of_context.unbind(2)
        for run in ctx.runs:
            states = list(itertools.islice(saved, 5))
            query, key, value = attend_segment_backward(run.of_tokens(grad_SND), states, Scores())
            run.of_tokens(of_query_SND).copy_(query)
            # Several spans may read one part of the context: an image's tags, and the text behind it.
            run.of_context(of_key).add_(key)
            run.of_context(of_value).add_(value)
        return of_query_SND, of_key, of_value, None
