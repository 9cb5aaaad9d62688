"""Our linear against megatron-core's: outputs, gradients, and where the weight's gradient goes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import layers
from torch import Tensor

from nvlm_train.parallel import linear
from nvlm_train.parallel.linear import Linear
from nvlm_train.parallel.weight_gradient import WeightGradient
from tests.parallel.calls import RecordedCalls

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def _answers(
    function: Any, device: str, dtype: torch.dtype, has_bias: bool, fuses: bool
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(10, 1, 24), (16, 24), (16,), (10, 1, 16)]
    x, weight, bias, grad = (
        torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes
    )
    leaves = [each.requires_grad_() for each in (x, weight, bias)]
    for parameter in leaves[1:]:
        # Not zero: an earlier microbatch has added to them.
        parameter.main_grad = torch.full(parameter.shape, 0.5, device=device)  # type: ignore[attr-defined]
        parameter.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    output = function.apply(
        x, weight, bias if has_bias else None, fuses, False, False, None, 0, None
    )
    output.backward(grad)
    answers = [output.detach(), x.grad]
    for parameter in leaves[1 : 3 if has_bias else 2]:
        if not parameter.grad_added_to_main_grad:  # type: ignore[attr-defined]
            parameter.main_grad.add_(parameter.grad)  # type: ignore[attr-defined]
        assert parameter.grad is not None, "the hook of overlapped reduction wants to see one"
        answers.append(parameter.main_grad)  # type: ignore[attr-defined]
    return answers  # type: ignore[return-value]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fuses", [True, False], ids=["fused", "separate"])
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
def test_it_is_megatron_cores(
    monkeypatch: pytest.MonkeyPatch, device: str, dtype: torch.dtype, fuses: bool, has_bias: bool
) -> None:
    # Without apex this name does not exist; megatron-core's takes it for the tensors' own device.
    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", WeightGradient, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device(device))
    with RecordedCalls() as theirs:
        expected = _answers(linear._of_megatron, device, dtype, has_bias, fuses)
    with RecordedCalls() as ours:
        found = _answers(Linear, device, dtype, has_bias, fuses)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=tolerance, atol=tolerance)
    assert len(ours.names) < len(theirs.names)


def test_what_it_does_not_do_is_megatron_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gathered sequence, or products that are put off."""
    called: list[Any] = []

    class Recorder:
        @staticmethod
        def apply(*arguments: Any) -> Tensor:
            called.append(arguments)
            return arguments[0]  # type: ignore[no-any-return]

    monkeypatch.setattr(linear, "_of_megatron", Recorder)
    x, weight = torch.ones(2, 3), torch.ones(4, 3)
    for options in ((False, True, None), (False, False, [])):
        Linear.apply(x, weight, None, False, *options, 0, None)  # type: ignore[arg-type]
    assert len(called) == 2


def test_megatron_core_has_the_replaced_names() -> None:
    assert all(hasattr(layers, name) for name in linear.OWN)
