"""The CPU's fused operations against their plain forms."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from nvlm_train.parallel import cpu_kernels, kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 1, 12), (0, 12), (7, 12)])
def test_swiglu_is_silu_times_up(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ours = torch.randn(shape, dtype=dtype, requires_grad=True)
    plain = ours.detach().clone().requires_grad_()
    gate, up = plain.chunk(2, dim=-1)
    expected = F.silu(gate) * up
    output = cpu_kernels.swiglu(ours, None, False, False)
    weight = torch.randn_like(output)
    (output * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(output, expected)
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad, plain.grad)


def test_swiglu_passes_gradcheck() -> None:
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda value: cpu_kernels.swiglu(value, None), (x,))


@pytest.mark.parametrize("shape", [(5, 1, 12), (0, 12), (7, 12)])
def test_rms_norm_is_torchs(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(shape, requires_grad=True), torch.randn(12, requires_grad=True)]
    plain = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    output = cpu_kernels.rms_norm(*leaves, 1e-5)
    expected = F.rms_norm(plain[0], (12,), plain[1], 1e-5)
    torch.testing.assert_close(output, expected)
    output.sin().sum().backward()
    expected.sin().sum().backward()
    for leaf, other in zip(leaves, plain, strict=True):
        torch.testing.assert_close(leaf.grad, other.grad)


def test_rms_norm_passes_gradcheck() -> None:
    x, weight = (torch.randn(size, dtype=torch.float64) for size in ((3, 2, 8), (8,)))
    x[0] = 0
    leaves = x.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda *values: cpu_kernels.rms_norm(*values, 0.5), leaves)


def test_rotary_turns_pairs() -> None:
    """The rotation equals one of complex numbers, and the backward turns back."""
    x = torch.randn(5, 1, 3, 8, dtype=torch.float64, requires_grad=True)
    angles = torch.randn(5, 1, 1, 4, dtype=torch.float64)
    parts = angles.cos(), angles.sin()
    turned = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
    expected = torch.cat([turned.real, turned.imag], dim=-1)
    torch.testing.assert_close(cpu_kernels.rotary(x, *parts), expected)
    assert torch.autograd.gradcheck(lambda value: cpu_kernels.rotary(value, *parts), (x,))


def test_gradients_are_scaled_where_they_are() -> None:
    gradients = [torch.ones(3), torch.full((2, 2), 4.0)]
    places = [gradient.data_ptr() for gradient in gradients]
    cpu_kernels.scale_in_place(1, torch.zeros(1), [gradients, gradients], 0.25)
    assert [gradient.data_ptr() for gradient in gradients] == places
    assert torch.equal(gradients[0], torch.full((3,), 0.25))
    assert torch.equal(gradients[1], torch.ones(2, 2))


def test_bf16_products_are_known_to_be_slow_or_fast() -> None:
    expected = torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert kernels.multiplies_bf16() == expected
