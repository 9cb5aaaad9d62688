"""Runs megatron-core without CUDA. No other file has to know that there may be no GPU.

megatron-core 0.16 names CUDA in three ways: calls of `torch.cuda`, the RNG functions of its
`tensor_parallel.random`, and string literals ("cuda", "torch.cuda.FloatTensor") inside functions.
`install` redirects all three to the CPU, and does nothing when there is CUDA. The tables below are
complete for what training uses. tests/parallel/test_cpu.py checks each entry against the installed
megatron-core, so that an upgrade which moves one of them fails loudly.
"""

from __future__ import annotations

import ctypes
import importlib
import inspect
import logging
import sys
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import torch

from nvlm_train.parallel import cpu_bf16, cpu_kernels, waiting
from nvlm_train.parallel.weight_gradient import WeightGradient

CPU = torch.device("cpu")

_LITERALS: dict[str, tuple[tuple[str, int], ...]] = {
    "pipeline_parallel.schedules": (
        ("forward_step", 1),
        ("forward_backward_no_pipelining", 1),
        ("forward_backward_pipelining_without_interleaving", 1),
        ("forward_backward_pipelining_with_interleaving", 1),
    ),
    "optimizer.optimizer": (
        ("MixedPrecisionOptimizer.__init__", 1),
        ("Float16OptimizerWithFloat16Params.__init__", 3),
        ("FP32Optimizer.__init__", 1),
    ),
    "optimizer.distrib_optimizer": (
        ("DistributedOptimizer.__init__", 2),
        ("DistributedOptimizer._build_model_and_main_param_groups", 3),
    ),
    "optimizer.clip_grads": (
        ("get_grad_norm_fp32", 1),
        ("clip_grad_by_total_norm_fp32", 2),
        ("count_zeros_fp32", 1),
    ),
    "utils": (("local_multi_tensor_l2_norm", 1),),
    "dist_checkpointing.exchange_utils": (
        ("_get_empty_tensor_for_exchange", 1),
        ("exchange_loaded_tensors_gather_rounds", 1),
    ),
    "dist_checkpointing.strategies.state_dict_saver": (("verify_global_md_reuse", 1),),
}
"""megatron.core module -> (function, number of its string constants that name CUDA)."""


def install() -> None:
    """Redirects megatron-core to the CPU. Returns at once when there is CUDA, or when it was called before.

    When it is called before megatron-core is imported for the first time, it also saves each process
    the import of torch's compiler (docs/megatron-on-cpu.md).

    Raises:
        RuntimeError: megatron-core is not the version that the tables describe.
    """
    if torch.cuda.is_available() or getattr(install, "done", False):
        return
    for symbols in (_torch_symbols, _megatron_symbols):
        for patch in symbols():
            if not hasattr(patch.owner, patch.name):
                gone = f"{patch.owner.__name__}.{patch.name}"
                raise RuntimeError(f"{gone} does not exist: update parallel/cpu.py")
            setattr(patch.owner, patch.name, patch.replacement)
    for module, functions in _LITERALS.items():
        for qualified_name, expected in functions:
            _redirect(module, qualified_name, expected)
    if "torch._dynamo" in sys.modules:
        # megatron-core was imported first: what it marked for compilation must not be compiled now.
        sys.modules["torch._dynamo"].config.disable = True
    # Its RNG tracker warns when the CPU's generator is used in place of the GPU's: here they are the same.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(_is_no_rng_warning)
    cpu_bf16.install()
    _keep_freed_memory()
    install.done = True  # type: ignore[attr-defined]


def _keep_freed_memory() -> None:
    """Lets a step reuse the memory that the last step freed.

    glibc returns the free end of its heap to the kernel, which zeroes it page by page for the next
    step. Other C libraries have no `mallopt`; nothing is changed there.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    # Setting one of them freezes the other at its small initial value, so both are set.
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""From malloc.h of glibc; 32 MiB is the largest value that it takes for the second."""


def _is_no_rng_warning(record: logging.LogRecord) -> bool:
    return "CPU RNG state changed" not in record.getMessage()


class Patch(NamedTuple):
    """Describes one attribute that is replaced."""

    owner: Any
    """Module or class."""
    name: str
    replacement: Any


def patched_symbols() -> list[Patch]:
    """Returns every attribute that `install` replaces."""
    return _torch_symbols() + _megatron_symbols()


def _torch_symbols() -> list[Patch]:
    return [
        Patch(torch, "compile", _as_written),
        Patch(torch.cuda, "current_device", lambda: CPU),
        Patch(torch.cuda, "synchronize", lambda device=None: None),
        Patch(torch.cuda, "get_rng_state", lambda device="cuda": torch.get_rng_state()),
        Patch(torch.cuda, "manual_seed", torch.default_generator.manual_seed),
        Patch(torch.distributed.Work, "wait", waiting.timed_wait),
        Patch(torch.Tensor, "cuda", lambda self, *args, **kwargs: self),
    ]


def _megatron_symbols() -> list[Patch]:
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    buffers = importlib.import_module("megatron.core.distributed.param_and_grad_buffer")
    clip_grads = importlib.import_module("megatron.core.optimizer.clip_grads")
    layers = importlib.import_module("megatron.core.tensor_parallel.layers")
    mlp = importlib.import_module("megatron.core.transformer.mlp")
    # Without apex this name does not exist; megatron-core uses it only where it calls it.
    layers.__dict__.setdefault("fused_weight_gradient_mlp_cuda", None)
    return [
        Patch(random, "_get_cuda_rng_state", _get_rng_state),
        Patch(random, "_set_cuda_rng_state", _set_rng_state),
        Patch(buffers, "dist_all_gather_func", cpu_kernels.all_gather),
        Patch(buffers, "dist_reduce_scatter_func", cpu_kernels.reduce_scatter),
        Patch(clip_grads, "multi_tensor_scale_impl", cpu_kernels.scale_in_place),
        Patch(layers, "_grad_accum_fusion_available", True),
        Patch(layers, "fused_weight_gradient_mlp_cuda", WeightGradient),
        Patch(mlp, "bias_swiglu_impl", cpu_kernels.swiglu),
    ]


def _as_written(model: Any = None, **options: Any) -> Any:
    """Takes the place of torch.compile, as a call and as a decorator, and returns the function unchanged.

    Compiling costs 8 s per process here and gains nothing. Importing the compiler alone is a quarter
    of a process's start.
    """
    return (lambda function: function) if model is None else model


def _get_rng_state(
    device: object = "cuda", clone: bool = False, graph_safe: bool = False
) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


def _redirect(module_name: str, qualified_name: str, expected: int) -> None:
    """Replaces the CUDA literals of one function, and checks their number."""
    function = _find(module_name, qualified_name)
    found: list[str] = []
    function.__code__ = _replace_constants(function.__code__, found)
    if len(found) != expected:
        raise RuntimeError(
            f"megatron.core.{module_name}.{qualified_name} names CUDA {len(found)} times, "
            f"{expected} expected: update parallel/cpu.py for this megatron-core"
        )


def _find(module_name: str, qualified_name: str) -> FunctionType:
    try:
        target: Any = importlib.import_module(f"megatron.core.{module_name}")
        for part in qualified_name.split("."):
            target = getattr(target, part)
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"megatron.core.{module_name}.{qualified_name} does not exist: update parallel/cpu.py"
        ) from error
    target = getattr(target, "__func__", target)  # a classmethod
    function = inspect.unwrap(target)
    assert isinstance(function, FunctionType)
    return function


def _replace_constants(code: CodeType, found: list[str]) -> CodeType:
    def swap(constant: Any) -> Any:
        if isinstance(constant, CodeType):
            return _replace_constants(constant, found)
        if isinstance(constant, tuple):
            return tuple(swap(item) for item in constant)
        if isinstance(constant, str) and (
            constant == "cuda" or constant.startswith("torch.cuda.") and "Tensor" in constant
        ):
            found.append(constant)
            return "cpu" if constant == "cuda" else constant.replace("torch.cuda.", "torch.")
        return constant

    return code.replace(co_consts=tuple(swap(constant) for constant in code.co_consts))
