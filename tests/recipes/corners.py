"""What ranks of a world of 128 hold of a recipe, built on the meta device under a fake process group.

python -m tests.recipes.corners RECIPE

Prints JSON: how many parameters the encoder has, and for each stage its layout and, of each rank that
was built, its place and its parameters by name: how many it holds, and how many ranks share the whole.
It is a process of its own because the device of megatron-core's parameters is replaced for good.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from nvlm_train.config.schema import ParallelConfig, Recipe, StageConfig
from nvlm_train.parallel import cpu

WORLD = 128


def corners(layout: ParallelConfig) -> dict[tuple[int, int], int]:
    """Places (tensor, pipeline) to ranks: each pipeline stage's first, a middle and the last one.

    Ranks are laid out tensor fastest, then data, then pipeline; a middle one has a middle data rank.
    """
    tensor, pipeline = layout.tensor, layout.pipeline
    data = WORLD // (tensor * pipeline)
    places = [(0, each, 0) for each in range(pipeline)]
    places += [(tensor // 2, pipeline // 2, data // 2), (tensor - 1, pipeline - 1, data - 1)]
    return {(t, p): t + tensor * (d + data * p) for t, p, d in places}


def parameters(recipe: Recipe, stage: StageConfig, rank: int) -> dict[str, tuple[int, int]]:
    """Builds one rank's model: parameters and the ranks that share them, by name."""
    from nvlm_train.model.build import build_model
    from nvlm_train.parallel import kernels
    from nvlm_train.parallel.topology import build_topology

    with fake_world(rank):
        topology = build_topology(stage.parallel, recipe.seed)
        with torch.device("meta"):
            model = build_model(recipe, stage, topology, kernels.detect())
        found = {}
        for name, parameter in model.named_parameters():
            assert parameter.is_meta, name
            is_shared = getattr(parameter, "tensor_model_parallel", False)
            found[name] = (parameter.numel(), topology.tensor_size if is_shared else 1)
    return found


@contextmanager
def fake_world(rank: int) -> Iterator[None]:
    """Process groups of 128 ranks of which this process is one, and nobody else is there."""
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=WORLD)
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def measure(name: str) -> dict[str, Any]:
    """Returns what is printed."""
    from nvlm_train.vision.encoder import KINDS
    from tests.recipes.shipped import load

    recipe = load(name)
    with torch.device("meta"):
        encoder = KINDS[recipe.model.vision.kind](recipe.model.vision)
    stages = {
        key: {
            "layout": [stage.parallel.tensor, stage.parallel.pipeline],
            "ranks": [
                {"place": place, "parameters": parameters(recipe, stage, rank)}
                for place, rank in corners(stage.parallel).items()
            ],
        }
        for key, stage in recipe.stages.items()
    }
    count = sum(each.numel() for _, each in encoder.named_parameters())
    return {"encoder": count, "stages": stages}


if __name__ == "__main__":
    cpu.install()
    # megatron-core makes its parameters there, whatever torch.device says.
    torch.cuda.current_device = lambda: torch.device("meta")  # type: ignore[assignment, return-value]
    json.dump(measure(sys.argv[1]), sys.stdout)
