"""Which kernels run, without a GPU; and the Adam that stands in for the fused ones."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nvlm_train.parallel import kernels
from nvlm_train.parallel.adam import GroupStepAdamW
from nvlm_train.parallel.kernels import Available, Kernels, choose
from tests.parallel import examine
from tests.parallel.calls import RecordedCalls

UPDATE = "aten._fused_adamw_.default"

CPU = Kernels("megatron", "torch_sdpa", "torch", "torch", "torch")
TORCH = Kernels("megatron", "torch_varlen", "torch", "torch", "torch", "torch_flex")
APEX = Kernels("megatron", "torch_varlen", "torch", "apex", "apex", "torch_flex")
_ENGINE = "transformer_engine"
ENGINE = Kernels(_ENGINE, _ENGINE, "torch", _ENGINE, _ENGINE, "torch_flex")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cuda", "engine", "apex", "expected"),
    [
        (False, False, False, CPU),
        (False, False, True, CPU),
        (False, True, False, CPU),
        (False, True, True, CPU),
        (True, False, False, TORCH),
        (True, False, True, APEX),
        (True, True, False, ENGINE),
        (True, True, True, ENGINE),
    ],
)
def test_choice(cuda: bool, engine: bool, apex: bool, expected: Kernels) -> None:
    assert choose(Available(cuda, engine, apex, apex_weight_gradient=apex)) == expected


def test_apex_may_lack_its_optional_extension() -> None:
    chosen = choose(
        Available(cuda=True, transformer_engine=False, apex=True, apex_weight_gradient=False)
    )
    assert (chosen.adam, chosen.weight_gradient) == ("apex", "torch")


@pytest.mark.parametrize(
    ("absent", "attention", "cross"),
    [
        ("varlen", "torch_flex", "torch_flex"),
        ("triton", "torch_sdpa", "torch_sdpa"),
        ("half_precision_heads", "torch_sdpa", "torch_sdpa"),
    ],
)
def test_attention_takes_what_torch_and_the_gpu_have(
    absent: str, attention: str, cross: str
) -> None:
    plain, engine = (
        choose(replace(Available(True, each, False, False), **{absent: False}))
        for each in (False, True)
    )
    assert (plain.attention, plain.cross_attention) == (attention, cross)
    assert (engine.attention, engine.cross_attention) == ("transformer_engine", cross)


@pytest.mark.parametrize(
    ("engine", "extension", "expected"),
    [
        (False, False, "separate"),
        (False, True, "apex"),
        # The output layer is megatron-core's: it needs one of the two others.
        (True, False, "separate"),
        (True, True, "transformer_engine"),
    ],
)
def test_an_early_torch_refuses_fp32_sums(engine: bool, extension: bool, expected: str) -> None:
    available = Available(True, engine, extension, extension, fp32_sums=False)
    assert choose(available).weight_gradient == expected


def test_the_choice_is_printed_by_name() -> None:
    text = (
        "linear=megatron attention=torch_varlen norm=torch adam=apex weight_gradient=apex "
        "cross_attention=torch_flex"
    )
    assert str(APEX) == text


def test_apex_of_pypi_is_not_nvidias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyPI's `apex` is a package for web applications; NVIDIA's comes with the extension amp_C."""
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for absent in ("transformer_engine", "amp_C"):
        monkeypatch.setitem(sys.modules, absent, None)
    assert kernels.detect().adam == "torch"
    monkeypatch.delitem(sys.modules, "amp_C")
    (tmp_path / "amp_C.py").write_text("")
    importlib.invalidate_caches()
    assert kernels.detect().adam == "apex"


def test_install_adam_swaps_these_names_only(fresh: ProcessPoolExecutor) -> None:
    factory, distributed = examine.OPTIMIZER_MODULES
    assert fresh.submit(examine.what_install_adam_changes).result(timeout=120) == {
        f"{factory}.Adam",
        f"{factory}.USING_PYTORCH_OPTIMIZER",
        f"{distributed}.Adam",
        f"{distributed}.HAVE_APEX_OR_TE",
        f"{distributed}.USING_APEX_OPTIMIZER",
    }


def test_install_weight_gradient_swaps_these_names_only(new: ProcessPoolExecutor) -> None:
    """As on a GPU without apex: megatron-core's linears then take fused gradients, and call ours."""
    changed, kernel = new.submit(examine.what_install_weight_gradient_changes).result(timeout=120)
    layers = "megatron.core.tensor_parallel.layers"
    assert changed == {
        f"{layers}.fused_weight_gradient_mlp_cuda",
        f"{layers}._grad_accum_fusion_available",
    }
    assert kernel == "nvlm_train.parallel.weight_gradient.WeightGradient"


def test_adam_is_torchs_with_the_step_in_the_group() -> None:
    ours, theirs = _parameters(), _parameters()
    optimizer, reference = GroupStepAdamW(_groups(ours)), torch.optim.AdamW(_groups(theirs))
    generator = torch.Generator().manual_seed(1)
    for step in range(20):
        for group, other in zip(optimizer.param_groups, reference.param_groups, strict=True):
            group["lr"] = other["lr"] = other["lr"] * 0.95
        for own, other in zip(ours, theirs, strict=True):
            own.grad = torch.randn(own.shape, generator=generator) * 10 ** (step % 3 - 1)
            other.grad = own.grad.clone()
        optimizer.step()
        reference.step()
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-6)
        assert set(optimizer.state[own]) == {"exp_avg", "exp_avg_sq"}
    assert [group["step"] for group in optimizer.param_groups] == [20, 20]


def test_a_step_is_one_call_a_group_whatever_the_number_of_parameters() -> None:
    """torch's functional AdamW, called before, makes a step tensor for each parameter."""
    counts = []
    for number in (3, 30):
        parameters = [torch.nn.Parameter(torch.ones(4)) for _ in range(number)]
        optimizer = GroupStepAdamW(_groups(parameters))
        _train(optimizer, parameters, range(2))
        with RecordedCalls() as calls:
            optimizer.step()
        counts.append(Counter(calls.names))
    assert counts[0] == counts[1] == Counter({"aten.full.default": 2, UPDATE: 2})


def test_every_parameter_is_updated_by_the_same_step() -> None:
    """One tensor is the step of all: nothing may count in it for each parameter."""
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(5)]
    optimizer = GroupStepAdamW(parameters, lr=0.1)
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.tensor([0.5, -2.0])
        optimizer.step()
    assert all(torch.equal(parameter, parameters[0]) for parameter in parameters)
    assert optimizer.param_groups[0]["step"] == 3


def test_adam_goes_on_from_its_state() -> None:
    whole, halves = _parameters(), _parameters()
    optimizer = GroupStepAdamW(_groups(whole))
    _train(optimizer, whole, range(6))
    first = GroupStepAdamW(_groups(halves))
    _train(first, halves, range(3))
    second = GroupStepAdamW(_groups(halves))
    second.load_state_dict(first.state_dict())
    _train(second, halves, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole, halves, strict=True))


def _parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(n, 3, generator=generator)) for n in (4, 1, 5)]


def _groups(parameters: list[torch.nn.Parameter]) -> list[dict]:
    settings = {"betas": (0.9, 0.95), "eps": 1e-8}
    return [
        {"params": parameters[:2], "lr": 1e-2, "weight_decay": 0.1, **settings},
        {"params": parameters[2:], "lr": 3e-3, "weight_decay": 0.0, **settings},
    ]


def _train(optimizer: GroupStepAdamW, parameters: list[torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        for number, parameter in enumerate(parameters):
            generator = torch.Generator().manual_seed(100 * step + number)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
