"""Products that are added to fp32 sums, in one call where there is one."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nvlm_train.parallel.weight_gradient import WeightGradient, add_product
from tests.parallel.calls import RecordedCalls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 6])
def test_weight_gradient_is_added(rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs, grad = torch.randn(rows, 4).to(dtype), torch.randn(rows, 3).to(dtype)
    main_grad = torch.randn(3, 4)
    expected = main_grad + (grad.t() @ inputs).float()
    WeightGradient.wgrad_gemm_accum_fp32(inputs, grad, main_grad)
    torch.testing.assert_close(main_grad, expected)


def test_rows_of_a_larger_matrix_are_added_to() -> None:
    torch.manual_seed(0)
    total, left, right = torch.zeros(7, 4), torch.randn(3, 5), torch.randn(5, 4)
    add_product(total[2:5], left, right)
    torch.testing.assert_close(total[2:5], left @ right)
    assert not total[:2].any() and not total[5:].any()


@pytest.mark.parametrize(
    ("device", "dtype", "calls"),
    [
        ("cpu", torch.float32, ["aten.addmm_.default"]),
        ("cuda", torch.float32, ["aten.addmm_.default"]),
        ("cuda", torch.bfloat16, ["aten.addmm.dtype_out"]),
        ("cpu", torch.bfloat16, ["aten.mm.default", "aten.add_.Tensor"]),
    ],
)
def test_there_is_one_call_but_for_bf16_on_a_cpu(
    device: str, dtype: torch.dtype, calls: list[str]
) -> None:
    """The tensors on CUDA are made up: only what is called is looked at."""
    with FakeTensorMode():
        total = torch.empty(8, 4, device=device)
        left = torch.empty(8, 6, dtype=dtype, device=device)
        right = torch.empty(6, 4, dtype=dtype, device=device)
        with RecordedCalls() as recorded:
            add_product(total, left, right)
    assert recorded.names == calls


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [0, 1, 300])
def test_sums_on_cuda_are_those_of_fp32(rows: int) -> None:
    """bf16 factors, an fp32 sum, nothing rounded in between: 1,000 times nearer than a bf16 product."""
    generator = torch.Generator().manual_seed(0)
    inputs, grad = (
        torch.randn(rows, size, generator=generator).bfloat16().cuda() for size in (256, 520)
    )
    whole = torch.randn(640, 256, generator=generator).cuda()
    expected = whole.clone()
    expected[64:584] += (grad.double().t() @ inputs.double()).float()
    WeightGradient.wgrad_gemm_accum_fp32(inputs, grad, whole[64:584])
    torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-4)
