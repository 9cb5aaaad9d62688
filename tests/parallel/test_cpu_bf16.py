"""bf16 products of CPUs without any: exact factors, one rounding, and none left to torch's scalar loop."""

from __future__ import annotations

import timeit
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from nvlm_train.config.schema import ParallelConfig
from nvlm_train.parallel import cpu_bf16
from tests.workers import WorkerPool

PRODUCTS = {
    *("mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "linear", "einsum"),
    *("convolution", "convolution_backward", "_scaled_dot_product_attention_math"),
    *(name for name in cpu_bf16.PRODUCTS if "attention" in name),
}
"""What ATen calls its operators with products that a model may call."""

COMPUTATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mm": lambda x, weight: x @ weight.t(),
    "addmm": lambda x, weight: F.linear(x, weight, weight[:, 0]),
    "convolution": lambda x, weight: F.conv2d(
        x.view(1, 3, 16, 16), weight.view(48, 3, 4, 4), weight[:, 1], stride=4
    ),
    "attention": lambda x, weight: F.scaled_dot_product_attention(
        x.view(1, 2, 24, 16), weight[:16].view(1, 2, 24, 16), weight[16:32].view(1, 2, 24, 16),
        is_causal=True,
    ),
}  # fmt: skip


def rounding_of_products() -> dict[str, list[float]]:
    """Returns the distance of bf16 results and both gradients from those of fp64, relative to their norms."""
    torch.manual_seed(0)
    factors = [torch.randn(16, 48), torch.randn(48, 48)]
    found: dict[str, list[float]] = {}
    for name, compute in COMPUTATIONS.items():
        runs = []
        for dtype in (torch.float64, torch.bfloat16):
            leaves = [each.bfloat16().to(dtype).requires_grad_() for each in factors]
            result = compute(*leaves)
            assert result.dtype == dtype
            if name != "convolution":  # the encoder is frozen
                result.float().square().sum().backward()
            runs.append([result, *(leaf.grad for leaf in leaves if leaf.grad is not None)])
        found[name] = [
            ((own.double() - exact).norm() / exact.norm()).item()
            for exact, own in zip(*runs, strict=True)
        ]
    return found


def products_of_a_step() -> set[str]:
    """Returns which of `PRODUCTS` a step of H and of Flamingo calls with bf16."""
    from nvlm_train.train.placing import place
    from nvlm_train.train.step import run_step
    from tests.parity import cross_gradients, cross_recipes

    called: set[str] = set()

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            # Inference mode, which the encoder runs in, shows operators before they are taken apart.
            with self:
                parts = function.decompose(*args, **(kwargs or {}))
            if parts is not NotImplemented:
                return parts
            if any(isinstance(a, Tensor) and a.dtype is torch.bfloat16 for a in args):
                called.add(function.name().removeprefix("aten::").split(".")[0])
            return function(*args, **(kwargs or {}))

    for name in ("h", "flamingo"):
        engine = cross_gradients.start_engine(name, ParallelConfig(), precision="bf16")
        packs, share = cross_recipes.MIXED, engine.topology.share
        with Record():
            batch = cross_recipes.step_batch(name, packs, share, 0, 1)
            run_step(engine, place(batch, engine.topology), num_sources=2)
    return called & PRODUCTS


def test_products_are_rounded_once(workers: WorkerPool) -> None:
    """One rounding to 8 bits is off by at most 2^-9. Gradients get the error of the result once more."""
    for name, distances in workers.run(1, rounding_of_products)[0].items():
        assert len(distances) == (1 if name == "convolution" else 3)
        assert 0 < distances[0] < 2**-9 and all(0 < each < 2**-7 for each in distances), name


def test_a_step_calls_no_other_product(workers: WorkerPool) -> None:
    called = workers.run(1, products_of_a_step)[0]
    # torch calls the convolution by this name on every device, and by the other one on a CPU.
    named = {"_slow_conv2d_forward" if name == "convolution" else name for name in called}
    assert named == set(cpu_bf16.PRODUCTS)


def bf16_against_fp32() -> float:
    """Returns the ratio of seconds of one product of the backward's kind, each the best of five."""
    best = []
    for dtype in (torch.bfloat16, torch.float32):
        grad, weight = torch.ones(256, 512).to(dtype), torch.ones(512, 256).to(dtype)
        best.append(min(timeit.repeat(lambda: grad @ weight, number=1, repeat=5)))  # noqa: B023
    return best[0] / best[1]


def test_a_product_does_not_take_fifty_times_as_long(workers: WorkerPool) -> None:
    """With torch's loop of scalars the ratio was 55, with ours it is 1.1."""
    assert workers.run(1, bf16_against_fp32)[0] < 15
