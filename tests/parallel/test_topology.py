"""Who is who in a layout, and layouts that follow each other in the same processes."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest
import torch

from nvlm_train.config.schema import ParallelConfig
from nvlm_train.errors import ConfigError
from nvlm_train.parallel.topology import (
    PlaceInWorld,
    build_topology,
    collect_engines,
    place_in_world,
)
from tests.doctor.test_ranks import free_port
from tests.workers import WorkerPool

TP2_PP2 = ParallelConfig(tensor=2, pipeline=2)
PP2 = ParallelConfig(pipeline=2)


def _places(layouts: list[ParallelConfig]) -> list[dict]:
    """Returns on the workers this rank's place in each layout, and the ranks it shares groups with."""
    import torch.distributed as dist

    places = []
    for parallel in layouts:
        topology = build_topology(parallel, seed=1)
        groups = ("replica_group", "data_group")
        shared = {name: dist.get_process_group_ranks(getattr(topology, name)) for name in groups}
        shared["features"] = [dist.get_process_group_ranks(group) for group in topology.features]
        ends = {"first": topology.is_first_pp_stage, "last": topology.is_last_pp_stage}
        places.append({**topology.__dict__, **shared, **ends, **asdict(topology.share)})
    return places


def test_tensor_parallel_ranks_are_neighbours(workers: WorkerPool) -> None:
    places = [own[0] for own in workers.run(4, _places, [TP2_PP2])]
    assert [(p["pipeline_rank"], p["tensor_rank"]) for p in places] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    ]
    assert [p["replica_rank"] for p in places] == [0, 1, 2, 3]
    assert [p["first"] for p in places] == [True, True, False, False]
    assert [p["last"] for p in places] == [False, False, True, True]
    for rank, place in enumerate(places):
        assert place["replica_group"] == [0, 1, 2, 3] and place["data_group"] == [rank]
        assert (place["dp_size"], place["replica_size"]) == (1, 4)
        assert place["features"] == [[0, 1, 2, 3], [0, 1] if rank < 2 else [2, 3]]


def test_data_parallel_ranks_lie_inside_pipeline_stages(workers: WorkerPool) -> None:
    places = [own[0] for own in workers.run(4, _places, [PP2])]
    assert [(p["pipeline_rank"], p["data_rank"]) for p in places] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    ]
    assert [p["replica_group"] for p in places] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    first, second = [0, 2], [1, 3]
    assert [p["features"] for p in places] == [
        [first, [0]],
        [second, [1]],
        [first, [2]],
        [second, [3]],
    ]
    assert [p["data_group"] for p in places] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [p["replica_rank"] for p in places] == [0, 0, 1, 1]


def test_a_stage_may_have_another_layout(workers: WorkerPool) -> None:
    """Sizes and groups are those of the last layout, and nothing is left of the ones before."""
    for earlier, again, alone in zip(
        workers.run(4, _places, [TP2_PP2, PP2, TP2_PP2]),
        workers.run(4, _places, [PP2, TP2_PP2]),
        workers.run(4, _places, [TP2_PP2]),
        strict=True,
    ):
        assert earlier[0] == earlier[2] == again[1] == alone[0]
        assert earlier[1] == again[0] != alone[0]


def _threads(times: int) -> list[int]:
    """Returns the threads of this process after each time that a topology was built."""
    counts = []
    for _ in range(times):
        build_topology(TP2_PP2, seed=1)
        counts.append(psutil.Process().num_threads())
    return counts


def test_groups_of_an_earlier_stage_are_ended(workers: WorkerPool) -> None:
    """Each group has threads: one more stage must not leave dozens of them."""
    for counts in workers.run(4, _threads, 4):
        assert max(counts) - counts[0] < 10, counts


def _rotary_lives_on() -> bool:
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    build_topology(ParallelConfig(), seed=1)
    embedding = RotaryEmbedding(kv_channels=8, rotary_percent=1.0)
    embedding(4)
    alive = weakref.ref(embedding)
    del embedding
    collect_engines()
    return alive() is not None


def test_megatrons_cache_of_angles_keeps_no_embedding(workers: WorkerPool) -> None:
    """It does not keep the process group either, whose threads wake a hundred times a second."""
    assert workers.run(1, _rotary_lives_on) == [False]


def _draws(parallel: ParallelConfig) -> tuple[list[float], list[float]]:
    """Returns on the workers numbers of the default generator, and of the tracker's."""
    import torch
    from megatron.core import tensor_parallel

    build_topology(parallel, seed=1)
    # The two do not move each other.
    with tensor_parallel.get_cuda_rng_tracker().fork():
        tracked = torch.rand(3)
    default = torch.rand(6)
    with tensor_parallel.get_cuda_rng_tracker().fork():
        tracked = torch.cat([tracked, torch.rand(3)])
    return default.tolist(), tracked.tolist()


@pytest.mark.parametrize(
    ("parallel", "places"),
    [
        (ParallelConfig(), [0, 1, 2, 3]),
        (PP2, [0, 1, 2, 3]),
        (ParallelConfig(tensor=2), [0, 0, 1, 1]),
        (TP2_PP2, [0, 0, 1, 1]),
    ],
    ids=["DP4", "PP2 DP2", "TP2 DP2", "TP2 PP2"],
)
def test_generators_of_dropout(
    workers: WorkerPool, parallel: ParallelConfig, places: list[int]
) -> None:
    """Only tensor-parallel ranks share the default one; the tracker's is each rank's own."""
    default, tracked = zip(*workers.run(4, _draws, parallel), strict=True)
    for one in range(4):
        for other in range(one):
            assert (default[one] == default[other]) == (places[one] == places[other])
            assert tracked[one] != tracked[other]
        assert len(set(default[one]) | set(tracked[one])) == 12
    alone = workers.run(1, _draws, ParallelConfig())[0]
    assert (default[0], tracked[0]) == alone


def _refusal() -> str:
    with pytest.raises(ConfigError) as caught:
        build_topology(TP2_PP2, seed=1)
    return str(caught.value)


def test_world_that_does_not_fit(workers: WorkerPool) -> None:
    for message in workers.run(3, _refusal):
        assert (
            "world size 3 is not a multiple of parallel.tensor=2 x parallel.pipeline=2" in message
        )
        assert "start a multiple of 4 processes" in message


def test_nccl_is_told_its_device() -> None:
    environment = {"RANK": "13", "WORLD_SIZE": "16", "LOCAL_RANK": "5"}
    place = place_in_world(environment, has_cuda=True)
    assert (place.backend, place.rank, place.world_size) == ("nccl", 13, 16)
    assert place.device == torch.device("cuda", 5)
    assert place_in_world({}, has_cuda=True).device == torch.device("cuda", 0)


def test_gloo_has_no_device() -> None:
    assert place_in_world({"RANK": "1", "WORLD_SIZE": "2"}, has_cuda=False) == PlaceInWorld(
        "gloo", 1, 2, None
    )


LEAVE = """
import torch.distributed as dist
from nvlm_train.config.schema import ParallelConfig
from nvlm_train.parallel.topology import build_topology, process_group
with process_group():
    build_topology(ParallelConfig(), 1)
    with process_group():
        pass
    assert dist.is_initialized(), "only who joined leaves"
assert not dist.is_initialized()
"""


def test_a_world_that_was_joined_is_left(tmp_path: Path) -> None:
    """It runs in a process of its own, because the pool's workers are in a world already."""
    environment = {**os.environ, "MASTER_PORT": str(free_port())}
    done = subprocess.run(
        [sys.executable, "-c", LEAVE], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "destroy_process_group" not in done.stderr, "torch warns of a group that was not ended"
