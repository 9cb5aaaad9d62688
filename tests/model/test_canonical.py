"""Initial weights are a function of name and seed, in whatever layout they lie."""

from __future__ import annotations

import pytest
import torch

from nvlm_train.config.schema import ParallelConfig
from nvlm_train.model.global_weights import own_slice, seeded_source, slice_of
from tests.model import initial
from tests.parity.recipes import LANGUAGE
from tests.workers import WorkerPool

LAYOUTS = {
    "TP2 SP": (2, ParallelConfig(tensor=2, sequence_parallel=True)),
    "PP2": (2, ParallelConfig(pipeline=2)),
    "TP2 PP2": (4, ParallelConfig(tensor=2, pipeline=2)),
}


@pytest.fixture(scope="module")
def single(workers: WorkerPool) -> tuple:
    return workers.run(1, initial.weights_and_fingerprint, ParallelConfig())[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_initial_weights_do_not_depend_on_layout(
    workers: WorkerPool, single: tuple, layout: str
) -> None:
    world, parallel = LAYOUTS[layout]
    results = workers.run(world, initial.weights_and_fingerprint, parallel)
    weights, fingerprint, _ = results[0]
    assert weights.keys() == single[0].keys()
    assert all(torch.equal(weights[name], single[0][name]) for name in weights)
    assert fingerprint == pytest.approx(single[1], rel=1e-12)
    for _, _, (before, after) in results:
        assert before == ""
        assert "language_model: weights add up to" in after, "every rank must stop"


def test_fingerprint_is_the_sum_of_magnitudes(single: tuple) -> None:
    weights, fingerprint, _ = single
    for part, value in fingerprint.items():
        own = [each for name, each in weights.items() if name.startswith(f"{part}.")]
        assert value == pytest.approx(sum(each.double().abs().sum().item() for each in own))


def test_weights_follow_their_rules(single: tuple) -> None:
    weights = single[0]
    assert len(weights) == 35
    for name, value in weights.items():
        if name.endswith("bias"):
            assert not value.any(), name
        elif "norm" in name:
            assert (value == 1).all(), name
        else:
            back = name.endswith(("linear_proj.weight", "linear_fc2.weight")) and "decoder" in name
            std = LANGUAGE.init_std / (8**0.5 if back else 1)
            assert value.std().item() == pytest.approx(std, rel=0.05), name
    matrices = [value for name, value in weights.items() if name.endswith("linear_proj.weight")]
    assert not torch.equal(matrices[0], matrices[1]), "every name has a seed of its own"


def test_seed_and_name_decide() -> None:
    first, second = seeded_source(LANGUAGE, 1), seeded_source(LANGUAGE, 2)
    assert torch.equal(first("a.weight", (3, 2)), first("a.weight", (3, 2)))
    assert not torch.equal(first("a.weight", (3, 2)), first("b.weight", (3, 2)))
    assert not torch.equal(first("a.weight", (3, 2)), second("a.weight", (3, 2)))


def test_a_tensor_of_another_shape_is_named() -> None:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    shard = ShardedTensor.from_rank_offsets("projector.norm.weight", torch.zeros(4), (0, 1, 2))
    assert torch.equal(own_slice(slice_of(shard), torch.arange(8.0)), torch.tensor([4.0, 5, 6, 7]))
    with pytest.raises(
        ValueError, match=r"projector.norm.weight has shape \(6,\), the model's is \(8,\)"
    ):
        own_slice(slice_of(shard), torch.zeros(6))
