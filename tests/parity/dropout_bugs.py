"""Deliberate bugs of dropout. Run on the workers."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from unittest import mock

from megatron.core import tensor_parallel
from torch import Tensor

from nvlm_train.config.schema import ParallelConfig
from nvlm_train.model import cross_attention, layers
from nvlm_train.model.language import LanguageModel
from tests.parity import dropout_runs
from tests.parity.dropout_runs import Rates

SLOPES = {"each rank drops words by itself": ("d", "TP2 SP")}
"""Bug that makes gradients wrong -> model and layout that show it."""


def slopes_with_bug(
    bug: str, name: str, parallel: ParallelConfig, rates: Rates
) -> dict[str, tuple[float, float]]:
    """Returns `dropout_runs.slopes` while the named bug is in place."""
    with _PATCHES[bug]():
        return dropout_runs.slopes(name, parallel, rates)


def gradients_with_bug(
    bug: str, name: str, parallel: ParallelConfig, rates: Rates
) -> tuple[float, dict[str, Tensor]]:
    """Returns `dropout_runs.gradients_of` while the named bug is in place."""
    with _PATCHES[bug]():
        return dropout_runs.gradients_of(name, parallel, rates)


def attention_masks_of_all_ranks(name: str, parallel: ParallelConfig) -> list[Tensor]:
    """Returns `dropout_runs.attention_masks` without forks of the generator."""
    with _drawing(lambda config, probability: nullcontext()):
        return dropout_runs.attention_masks(name, parallel)


def _each_rank_its_words():
    def broken(self: LanguageModel, token_ids_S: Tensor) -> Tensor:
        self.embedding.embedding_dropout.p = self.config.hidden_dropout
        return self.embedding(token_ids_S[None], None)

    return mock.patch.object(LanguageModel, "embed", broken)


def _second_fork():
    return _drawing(lambda config, probability: tensor_parallel.get_cuda_rng_tracker().fork())


def _drawing(broken) -> ExitStack:
    stack = ExitStack()
    for module in (layers, cross_attention):
        stack.enter_context(mock.patch.object(module, "drawing_for_heads", broken))
    return stack


_PATCHES = {
    "each rank drops words by itself": _each_rank_its_words,
    "attention forks under sequence parallelism too": _second_fork,
}
