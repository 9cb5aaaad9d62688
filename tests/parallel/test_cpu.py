"""The CPU support against the installed megatron-core: an upgrade that moves something fails here."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

from nvlm_train.parallel import cpu
from tests.parallel import examine

TABLE = [(module, name, count) for module, names in cpu._LITERALS.items() for name, count in names]


@pytest.fixture(scope="module")
def report(fresh: ProcessPoolExecutor) -> dict[str, Any]:
    return fresh.submit(examine.before_and_after_install).result(timeout=120)


def test_patched_symbols_exist(report: dict[str, Any]) -> None:
    assert report["missing"] == []
    random = "megatron.core.tensor_parallel.random"
    assert set(report["symbols"]) == {
        "torch.compile",
        "torch.cuda.current_device",
        "torch.cuda.synchronize",
        "torch.cuda.get_rng_state",
        "torch.cuda.manual_seed",
        "Tensor.cuda",
        "Work.wait",
        f"{random}._get_cuda_rng_state",
        f"{random}._set_cuda_rng_state",
        "megatron.core.distributed.param_and_grad_buffer.dist_all_gather_func",
        "megatron.core.distributed.param_and_grad_buffer.dist_reduce_scatter_func",
        "megatron.core.optimizer.clip_grads.multi_tensor_scale_impl",
        "megatron.core.tensor_parallel.layers._grad_accum_fusion_available",
        "megatron.core.tensor_parallel.layers.fused_weight_gradient_mlp_cuda",
        "megatron.core.transformer.mlp.bias_swiglu_impl",
    }


@pytest.mark.parametrize(("module", "name", "count"), TABLE)
def test_literals_are_where_the_table_says(
    report: dict[str, Any], module: str, name: str, count: int
) -> None:
    assert len(report["literals"][module, name]) == count
    assert report["left"][module, name] == []


def test_nothing_is_replaced_where_cuda_is_there(report: dict[str, Any]) -> None:
    assert report["with CUDA"] == report["unpatched"]


def test_everything_is_replaced_once(report: dict[str, Any]) -> None:
    assert len(report["unpatched"]) == len(report["symbols"]) + len(TABLE)
    assert all(
        old != new for old, new in zip(report["unpatched"], report["installed"], strict=True)
    )
    assert report["installed twice"] == report["installed"]
    assert report["device"] == ("cpu", "cpu")


def test_another_megatron_core_is_an_error(report: dict[str, Any]) -> None:
    moved, miscounted, gone = report["errors"]
    assert "megatron.core.utils.no_such_function" in moved
    assert "megatron.core.utils.local_multi_tensor_l2_norm names CUDA 1 times, 2 expected" in (
        miscounted
    )
    assert "torch.cuda.no_such_symbol does not exist" in gone
    assert all("parallel/cpu.py" in message for message in report["errors"])


def test_nothing_is_compiled(fresh: ProcessPoolExecutor, new: ProcessPoolExecutor) -> None:
    """When it is installed first, nobody imports torch's compiler; when late, nothing is compiled."""
    assert new.submit(examine.compiler_after_training_is_imported).result(timeout=120) == []
    assert not fresh.submit(examine.is_compiled_when_installed_late).result(timeout=120)
