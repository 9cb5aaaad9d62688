"""The stream of batches is one and the same, whoever reads it: ranks, workers, from wherever."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nvlm_train.batch import RankShare, StepBatch
from nvlm_train.config.schema import BatchConfig, LoaderConfig
from nvlm_train.data.loading.loader import Loader
from nvlm_train.data.plan.plan import DataPlan
from nvlm_train.data.samples.encoder import SampleEncoder

MakePlan = Callable[..., DataPlan]
MakeEncoder = Callable[..., SampleEncoder]
Contents = Counter[str]

STEPS = 5
SIZES = st.sampled_from([1, 2, 3, 4, 8])
WORKERS = st.sampled_from([0, 1, 4])
BATCHES = st.one_of(
    st.builds(BatchConfig, size=st.integers(1, 20)),
    st.builds(
        BatchConfig,
        size=st.integers(1, 8),
        unit=st.just("packs"),
        window=st.integers(8, 40),
        max_tiles_per_pack=st.sampled_from([None, 14, 30]),
    ),
)


def contents_of(batch: StepBatch) -> Iterator[str]:
    """A name for everything in each pack of one rank: keys, tokens, labels, pixels."""
    for part in batch.rounds:
        tiles = torch.split(part.pixels_TCEE, [pack.num_tiles for pack in part.microbatches])
        for pack, pixels_TCEE in zip(part.microbatches, tiles, strict=True):
            if not pack.samples:
                continue  # a rank for which no pack was left
            digest = hashlib.sha256(repr(pack.samples).encode())
            for tensor in (
                pack.token_ids_S, pack.image_positions, pack.label_positions_L, pack.label_ids_L,
                pack.label_samples_L, pack.cu_seqlens, pixels_TCEE,
            ):  # fmt: skip
                digest.update(tensor.contiguous().numpy().tobytes())
            yield digest.hexdigest()


def read(
    plan: DataPlan, encoder: SampleEncoder, dp_size: int, workers: int, start: int
) -> list[Contents]:
    """What all data-parallel ranks together read in steps start, ..., STEPS - 1."""
    found = [Contents() for _ in range(start, STEPS)]
    for rank in range(dp_size):
        share, config = RankShare(rank, dp_size), LoaderConfig(workers=workers)
        with Loader(plan, encoder, share, config, 20, count(start)) as loader:
            for contents in found:
                contents.update(contents_of(next(loader)))
    return found


@pytest.mark.slow
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(BATCHES, st.integers(0, 2**31), SIZES, WORKERS, SIZES, WORKERS, st.integers(0, STEPS - 1))
def test_the_stream_depends_on_neither_ranks_nor_workers_nor_where_it_is_resumed(
    make_plan: MakePlan,
    make_encoder: MakeEncoder,
    batch: BatchConfig,
    seed: int,
    size: int,
    workers: int,
    resumed_size: int,
    resumed_workers: int,
    start: int,
) -> None:
    encoder = make_encoder()
    whole = read(make_plan(batch, seed), encoder, 1, 0, 0)
    assert all(whole)
    assert read(make_plan(batch, seed), encoder, size, workers, 0) == whole
    resumed = read(make_plan(batch, seed), encoder, resumed_size, resumed_workers, start)
    assert resumed == whole[start:]
