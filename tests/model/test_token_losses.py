"""Losses of trained tokens in chunks of the vocabulary: equal losses and gradients, less memory."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nvlm_train.config.schema import ParallelConfig
from nvlm_train.model.output import token_losses
from nvlm_train.parallel.topology import process_group
from tests.model import loss_memory, loss_runs
from tests.model.loss_runs import BUGS, Case, Found
from tests.workers import WorkerPool

TOLERANCE = 2e-6
"""Of the largest value of each tensor, in fp32. 4e-7 is measured."""

ALL_ROWS, SOME_ROWS = 10_000, 104
CASES = {
    "one chunk": Case(ALL_ROWS),
    "chunks": Case(SOME_ROWS),
    "chunks, gradient for autograd": Case(SOME_ROWS, weight_gradient="separate"),
    "chunks, frozen table": Case(SOME_ROWS, table="frozen"),
    "one chunk, tied table": Case(ALL_ROWS, table="tied"),
    "chunks, tied table": Case(SOME_ROWS, table="tied"),
}
WITHOUT_PADDING = {
    weight_gradient: Case(ALL_ROWS, "fp32", weight_gradient, num_tokens=loss_runs.VOCABULARY)
    for weight_gradient in ("torch", "separate")
}


def parallel_of(world: int) -> ParallelConfig:
    return ParallelConfig(tensor=world, sequence_parallel=world > 1)


def distances(found: Found, expected: Found) -> list[float]:
    """Returns the largest differences relative to the largest value: losses, hidden states, table."""
    return [
        float((own.double() - other.double()).abs().max() / other.abs().max())
        for own, other in _pairs(found, expected)
    ]


def norms(found: Found, expected: Found) -> list[float]:
    """Returns the distances relative to the norm."""
    return [float((own - other).norm() / other.norm()) for own, other in _pairs(found, expected)]


def _pairs(found: Found, expected: Found) -> list[tuple[Tensor, Tensor]]:
    assert (found.grad_table_VH is None) == (expected.grad_table_VH is None)
    pairs = zip(vars(found).values(), vars(expected).values(), strict=True)
    return [(own, other) for own, other in pairs if own is not None]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_losses_and_gradients_are_those_of_all_logits(workers: WorkerPool, world: int) -> None:
    by_rank = workers.run(world, loss_runs.compare, parallel_of(world), CASES)
    for rank in by_rank:
        for name, found in rank.items():
            assert max(distances(found.chunks, found.at_once)) < TOLERANCE, name
            assert max(distances(found.chunks, found.exact)) < TOLERANCE, name
            first = by_rank[0][name].chunks
            assert torch.equal(found.chunks.losses_L, first.losses_L), name
            assert torch.equal(found.chunks.grad_hidden_LH, first.grad_hidden_LH), name
            table = found.chunks.grad_table_VH
            assert (table is None) == ("frozen" in name)
            assert table is None or not table[loss_runs.NUM_TOKENS :].any(), name


def test_one_chunk_on_one_rank_is_bitwise_the_same(workers: WorkerPool) -> None:
    (compared,) = workers.run(1, loss_runs.compare, ParallelConfig(), WITHOUT_PADDING)
    for name, found in compared.items():
        for own, other in _pairs(found.chunks, found.at_once):
            assert torch.equal(own, other), name


@pytest.mark.parametrize("world", [1, 2])
def test_bf16_is_as_near_the_exact_numbers_as_before(workers: WorkerPool, world: int) -> None:
    """A CPU rounds the product of each chunk; 1.12 times the distance is measured, and 1 of one chunk."""
    cases = {name: replace(case, precision="bf16") for name, case in CASES.items()}
    compared = workers.run(world, loss_runs.compare, parallel_of(world), cases)[0]
    for name, found in compared.items():
        before, now = (norms(each, found.exact) for each in (found.at_once, found.chunks))
        assert all(own < 1.2 * other for own, other in zip(now, before, strict=True)), name
        assert max(before) < 0.01, name


@pytest.mark.parametrize("world", [1, 2])
def test_deliberate_bugs_are_caught(workers: WorkerPool, world: int) -> None:
    case, bugs = CASES["chunks"], [bug for bug in BUGS if BUGS[bug] == world]
    found = workers.run(world, loss_runs.with_bugs, bugs, parallel_of(world), case)[0]
    assert set(found) == set(bugs) and len(bugs) >= 3
    for bug, each in found.items():
        assert max(distances(each, loss_runs.exact(case))) > 1000 * TOLERANCE, bug


def test_turning_in_one_is_turning_step_by_step() -> None:
    """What CUDA compiles gives the same numbers as what a CPU runs."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        logits_LC = (3 * torch.randn(5, 24, generator=generator)).to(dtype)
        place_L = torch.tensor([0, 23, -1, 24, 7])
        softmax = token_losses._read(logits_LC, place_L, None)
        grad_L = torch.rand(5, generator=generator)
        turned = []
        for turn in (token_losses._turn, token_losses._turn_in_one):
            values: Tensor = logits_LC.clone()
            turn(values, place_L, softmax, grad_L)
            turned.append(values)
        torch.testing.assert_close(*turned, rtol=1e-6, atol=1e-7)
        assert not torch.equal(turned[0], logits_LC)


@pytest.mark.parametrize(
    ("tokens", "rows"), [(1, 1), (5, 320), (37, 491), (2048, 151_936), (100_000, 151_936), (3, 0)]
)
def test_chunks_cover_every_row_once(tokens: int, rows: int) -> None:
    chunks = list(token_losses._chunks(tokens, rows))
    assert [row for start, stop in chunks for row in range(start, stop)] == list(range(rows))
    most = max(token_losses.CHUNK_ELEMENTS, token_losses.ROWS_ALIGNED * tokens)
    # Rounded up to whole tiles.
    slack = token_losses.ROWS_ALIGNED * tokens
    assert all((stop - start) * tokens < most + slack for start, stop in chunks)
    if rows * tokens <= token_losses.CHUNK_ELEMENTS:
        assert len(chunks) == min(rows, 1)


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_peak_is_at_most_a_quarter(workers: WorkerPool, precision: str, tensor: int) -> None:
    """At 2,048 trained tokens and 152k rows, counted from storages on the meta device."""
    chunks, at_once = workers.run(1, loss_memory.peaks, precision, tensor)[0]
    assert at_once > 2048 * 151_936 // tensor * 4
    assert chunks <= at_once / 4


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_finds_what_a_cpu_does(dtype: torch.dtype) -> None:
    """In chunks, with compiled elementwise work and sums in fp32 where a CPU has them step by step."""
    with process_group():
        found = [loss_runs.on(device, dtype) for device in ("cuda", "cpu")]
    for own, other in zip(*found, strict=True):
        distance = (own.cpu().float() - other.float()).norm() / other.float().norm()
        assert distance < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.gpu
def test_the_peak_on_cuda_is_at_most_a_quarter() -> None:
    with process_group():
        chunks, at_once = loss_memory.peaks_on_cuda("bf16")
    assert chunks <= at_once / 4


@pytest.mark.slow
def test_what_cuda_compiles_compiles() -> None:
    """Compiled for a CPU in a process of its own, since training turns the compiler off there."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.model.loss_compiled"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
