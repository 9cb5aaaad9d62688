"""Runs in a fresh process: what cpu.install and kernels.install_adam find and change."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import CodeType
from typing import Any
from unittest import mock

import torch

from nvlm_train.parallel import cpu, kernels

OPTIMIZER_MODULES = ("megatron.core.optimizer", "megatron.core.optimizer.distrib_optimizer")


def before_and_after_install() -> dict[str, Any]:
    """Returns everything that test_cpu.py judges, in the order in which it must be examined."""
    symbols = cpu.patched_symbols()
    report: dict[str, Any] = {
        "symbols": [f"{each.owner.__name__}.{each.name}" for each in symbols],
        "missing": [each.name for each in symbols if not hasattr(each.owner, each.name)],
        "literals": {key: _literals(*key) for key in _table()},
        "unpatched": _snapshot(),
    }
    with mock.patch.object(torch.cuda, "is_available", lambda: True):
        cpu.install()
    report["with CUDA"] = _snapshot()
    report["errors"] = [_error_of(table) for table in ({"utils": (("no_such_function", 1),)},)]
    function = cpu._find("utils", "local_multi_tensor_l2_norm")
    original = function.__code__
    report["errors"].append(_error_of({"utils": (("local_multi_tensor_l2_norm", 2),)}))
    function.__code__ = original
    gone = [cpu.Patch(torch.cuda, "no_such_symbol", lambda: None)]
    with mock.patch.object(cpu, "_torch_symbols", lambda: gone):
        report["errors"].append(_error_of({}))
    cpu.install()
    report["installed"] = _snapshot()
    report["left"] = {key: _literals(*key) for key in _table()}
    cpu.install()
    report["installed twice"] = _snapshot()
    report["device"] = str(torch.zeros(1).cuda().device), str(torch.cuda.current_device())
    return report


def compiler_after_training_is_imported() -> list[str]:
    """Returns the modules of torch's compiler that are loaded after training was imported."""
    cpu.install()
    importlib.import_module("nvlm_train.train.loop")
    return [name for name in ("torch._dynamo", "torch._inductor.compile_fx") if name in sys.modules]


def is_compiled_when_installed_late() -> bool:
    """Returns whether a fusion of megatron-core that was imported before `install` is compiled."""
    fusion = importlib.import_module("megatron.core.fusions.fused_bias_gelu").bias_gelu
    compiler = importlib.import_module("torch._dynamo.utils").counters
    cpu.install()
    fusion(torch.zeros(2), torch.zeros(3, 2))
    return bool(compiler["frames"])


def what_install_adam_changes() -> set[str]:
    """Returns the names in the optimizer modules that are other objects afterwards."""
    return _changed(OPTIMIZER_MODULES, kernels.install_adam)


def what_install_weight_gradient_changes() -> tuple[set[str], str]:
    """Returns the names in megatron-core's linears that are other objects, and what the kernel is."""
    module = "megatron.core.tensor_parallel.layers"
    changed = _changed((module,), kernels.install_weight_gradient)
    kernel = sys.modules[module].fused_weight_gradient_mlp_cuda
    return changed, f"{kernel.__module__}.{kernel.__qualname__}"


def _changed(names: tuple[str, ...], install: Callable[[], None]) -> set[str]:
    modules = [importlib.import_module(name) for name in names]
    before = [dict(vars(module)) for module in modules]
    install()
    return {
        f"{module.__name__}.{name}"
        for module, old in zip(modules, before, strict=True)
        for name, value in vars(module).items()
        if name not in old or old[name] is not value
    }


def _table() -> list[tuple[str, str]]:
    return [(module, name) for module, names in cpu._LITERALS.items() for name, _ in names]


def _literals(module: str, name: str) -> list[str]:
    found: list[str] = []
    cpu._replace_constants(cpu._find(module, name).__code__, found)
    return found


def _snapshot() -> list[int]:
    """Returns the identities of everything that may be replaced."""
    symbols: list[Callable | CodeType] = [
        getattr(each.owner, each.name) for each in cpu.patched_symbols()
    ]
    _KEPT.extend(symbols)
    codes = [cpu._find(*key).__code__ for key in _table()]
    _KEPT.extend(codes)
    return [id(each) for each in (*symbols, *codes)]


_KEPT: list[Any] = []
"""So that no identity is used twice."""


def _error_of(literals: dict) -> str:
    with mock.patch.object(cpu, "_LITERALS", literals):
        try:
            cpu.install()
        except RuntimeError as error:
            return str(error)
    return "no error"
