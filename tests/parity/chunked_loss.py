"""Runs on the workers: whole steps whose losses are computed in several chunks of the vocabulary."""

from __future__ import annotations

from typing import Any
from unittest import mock

from nvlm_train.config.schema import ParallelConfig
from nvlm_train.model.output import token_losses
from tests.parity import gradients
from tests.parity.gradients import Gradients


def gradients_of_step(
    parallel: ParallelConfig, steps: list, **changes: Any
) -> tuple[list[float], Gradients, int]:
    """Returns what `gradients.gradients_of_step` does, and the most chunks that a loss had on this rank."""
    most = 0
    chunks = token_losses._chunks

    def counted(tokens: int, rows: int) -> Any:
        nonlocal most
        found = list(chunks(tokens, rows))
        most = max(most, len(found))
        return iter(found)

    with (
        mock.patch.object(token_losses, "CHUNK_ELEMENTS", 1),
        mock.patch.object(token_losses, "ROWS_ALIGNED", 48),
        mock.patch.object(token_losses, "_chunks", counted),
    ):
        losses, found = gradients.gradients_of_step(parallel, steps, **changes)
    return losses, found, most
