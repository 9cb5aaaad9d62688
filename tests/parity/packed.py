"""Runs on the workers: steps of D, X and H whose attention reads whole packs, as on a GPU without Transformer
Engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import numpy as np

from nvlm_train.config.schema import ParallelConfig
from nvlm_train.model.attention import intervals
from nvlm_train.parallel import kernels
from tests.model.attention_runs import flex_without_a_compiler
from tests.parity import cross_gradients
from tests.parity.gradients import Gradients


def gradients_of_steps(name: str, parallel: ParallelConfig) -> tuple[list[float], Gradients]:
    """Returns `cross_gradients.gradients_of_steps` with flex attention in every layer."""
    with _packed():
        return cross_gradients.gradients_of_steps(name, parallel)


def gradients_with_a_leak(name: str, parallel: ParallelConfig) -> tuple[list[float], Gradients]:
    """Deliberate bug: samples of a pack see those before them."""

    def leaking(lengths: tuple[int, ...]) -> intervals.Intervals:
        right = of_segments(lengths)
        return right._replace(first_Q=np.zeros_like(right.first_Q))

    of_segments = intervals.of_segments
    with mock.patch.object(intervals, "of_segments", leaking):
        return gradients_of_steps(name, parallel)


@contextmanager
def _packed() -> Iterator[None]:
    chosen = replace(kernels.detect(), attention="torch_flex", cross_attention="torch_flex")
    with flex_without_a_compiler(), mock.patch.object(kernels, "detect", lambda: chosen):
        yield
