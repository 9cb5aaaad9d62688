"""Features reach the first pipeline stage in order, and nothing is copied for it."""

from __future__ import annotations

import pytest

from nvlm_train.config.schema import ParallelConfig
from tests.vision import exchange
from tests.workers import WorkerPool

TP2, TP4 = ParallelConfig(tensor=2), ParallelConfig(tensor=4)
PP2, TP2_PP2 = ParallelConfig(pipeline=2), ParallelConfig(tensor=2, pipeline=2)


@pytest.mark.parametrize(
    ("parallel", "split"),
    [
        (ParallelConfig(), (5,)),
        (TP2, (3, 3)),
        (TP2, (0, 1)),
        (PP2, (2, 3)),
        (TP2_PP2, (2, 2, 2, 1)),
        (TP2_PP2, (0, 5, 0, 4)),
        (TP2_PP2, (0, 0, 0, 0)),
        (TP4, (1, 1, 1, 0)),
    ],
    ids=str,
)
def test_features_arrive_in_order_without_copies(
    workers: WorkerPool, parallel: ParallelConfig, split: tuple[int, ...]
) -> None:
    tile_bytes = 4 * exchange.SHAPE[0] * exchange.SHAPE[1]
    for rank, arrived in enumerate(workers.run(len(split), exchange.exchange, parallel, split)):
        assert arrived.sends_own
        if rank >= parallel.tensor:
            assert arrived.features is None and arrived.made_bytes == 0
            continue
        assert arrived.features.shape == (sum(split), *exchange.SHAPE)
        assert arrived.features[:, 0, 0].tolist() == list(range(sum(split)))
        # All tiles once, and what fills the last block up; a send buffer would come on top.
        filled = -(-sum(split) // parallel.tensor) * parallel.tensor
        assert arrived.made_bytes == (filled * tile_bytes if len(split) > 1 else 0)
