"""Runs on the workers: losses in chunks of the vocabulary, beside those of all logits at once.

Shape legend: L trained tokens, H hidden, V this rank's rows of the vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor

from nvlm_train.config.schema import ParallelConfig
from nvlm_train.model.build import DTYPES, transformer_config
from nvlm_train.model.output import token_losses
from nvlm_train.model.output.layer import OutputLayer
from nvlm_train.parallel import kernels
from nvlm_train.parallel.topology import Topology, build_topology, device
from tests.parity import recipes

NUM_TOKENS, VOCABULARY, ROWS = 471, 640, 37
"""At TP2 the second rank has 151 tokens and 169 rows of padding, at TP4 the last has padding alone."""


@dataclass(frozen=True)
class Case:
    """Says how the output layer is built and what is trained."""

    chunk_rows: int
    """Rows of the vocabulary in a chunk."""
    precision: str = "fp32"
    weight_gradient: str = "torch"
    table: str = "trained"
    """`trained`, `frozen`, or `tied`: the embedding's, of the same pipeline stage."""
    num_tokens: int = NUM_TOKENS
    """Rows from there on are padding."""


@dataclass(frozen=True)
class Found:
    """Holds whole tensors, the same on every rank."""

    losses_L: Tensor
    grad_hidden_LH: Tensor
    grad_table_VH: Tensor | None


@dataclass(frozen=True)
class _Problem:
    layer: OutputLayer
    table: torch.nn.Parameter
    hidden_LBH: Tensor
    labels_L: Tensor
    weights_L: Tensor


@dataclass(frozen=True)
class Compared:
    """Holds what this file's chunks, megatron-core's cross-entropy and fp64 on all rows find."""

    chunks: Found
    at_once: Found
    exact: Found


def compare(parallel: ParallelConfig, cases: dict[str, Case]) -> dict[str, Compared]:
    """Computes losses and gradients of each case in three ways."""
    topology = build_topology(parallel, 0)
    compared = {}
    for name, case in cases.items():
        problem = _problem(topology, parallel, case)
        with chunks_of(case.chunk_rows):
            chunks = _found(problem, in_chunks)
        compared[name] = Compared(chunks, _found(problem, at_once), exact(case))
    return compared


def in_chunks(problem: _Problem) -> Tensor:
    return problem.layer(problem.hidden_LBH, problem.table, problem.labels_L)  # type: ignore[no-any-return]


def at_once(problem: _Problem) -> Tensor:
    logits = problem.layer(problem.hidden_LBH, problem.table)
    losses: Tensor = vocab_parallel_cross_entropy(logits.float(), problem.labels_L[:, None])
    return losses[:, 0]


@contextlib.contextmanager
def chunks_of(rows: int) -> Iterator[None]:
    """Makes chunks of so many rows, for the number of tokens in these tests."""
    with (
        mock.patch.object(token_losses, "CHUNK_ELEMENTS", rows * ROWS),
        mock.patch.object(token_losses, "ROWS_ALIGNED", 8),
    ):
        yield


def _problem(topology: Topology, parallel: ParallelConfig, case: Case) -> _Problem:
    language = replace(
        recipes.LANGUAGE, num_kv_heads=4, vocab_size=VOCABULARY, num_tokens=case.num_tokens
    )
    model = replace(recipes.MODEL, language=language)
    recipe = recipes.recipe(parallel, model=model, precision=case.precision)
    stage = recipe.stages["sft"]
    chosen = replace(kernels.detect(), weight_gradient=case.weight_gradient)  # type: ignore[arg-type]
    config = transformer_config(recipe, stage, chosen)
    layer = OutputLayer(config, language, topology, skip_table=case.table == "tied")
    dtype = DTYPES[recipe.precision]
    hidden_LH, table_VH, labels_L, weights_L = _numbers(language.hidden_size)
    own = table_VH.chunk(topology.tensor_size)[topology.tensor_rank]
    table = torch.nn.Parameter(own.to(device(), dtype), requires_grad=case.table != "frozen")
    # As megatron-core's DDP marks it.
    table.main_grad = torch.zeros(table.shape, device=device())  # type: ignore[attr-defined]
    table.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    if case.table == "tied":
        table.zero_out_wgrad = True  # type: ignore[attr-defined]
    hidden_LBH = hidden_LH[:, None].to(device(), dtype).requires_grad_()
    return _Problem(layer, table, hidden_LBH, labels_L.to(device()), weights_L.to(device()))


def _numbers(hidden_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns hidden states, table, labels and weights; both factors are numbers that bf16 has."""
    generator = torch.Generator().manual_seed(3)
    hidden_LH = torch.randn(ROWS, hidden_size, generator=generator).bfloat16().float()
    table_VH = 0.3 * torch.randn(VOCABULARY, hidden_size, generator=generator)
    table_VH = table_VH.bfloat16().float()
    table_VH[NUM_TOKENS:] = 0
    labels_L = torch.randint(0, NUM_TOKENS, (ROWS,), generator=generator)
    # The first and the last row of some chunk, and of the vocabulary.
    labels_L[:4] = torch.tensor([0, 319, 320, NUM_TOKENS - 1])
    return hidden_LH, table_VH, labels_L, torch.rand(ROWS, generator=generator) / ROWS


def _found(problem: _Problem, losses_of: Any) -> Found:
    problem.table.main_grad.zero_()  # type: ignore[attr-defined]
    problem.table.grad = problem.hidden_LBH.grad = None
    losses_L = losses_of(problem)
    (losses_L * problem.weights_L).sum().backward()
    table = problem.table
    grad = table.main_grad.clone()  # type: ignore[attr-defined]
    if table.grad is not None and not table.grad_added_to_main_grad:  # type: ignore[attr-defined]
        grad += table.grad
    assert problem.hidden_LBH.grad is not None
    grad_table = torch.cat(_from_all(grad)) if table.requires_grad else None
    return Found(losses_L.detach(), problem.hidden_LBH.grad[:, 0], grad_table)


def on(place: str, dtype: torch.dtype) -> list[Tensor]:
    """Returns losses and both gradients of one rank in chunks on a device."""
    group = dist.group.WORLD
    assert group is not None
    hidden_LH, table_VH, labels_L, weights_L = _numbers(recipes.LANGUAGE.hidden_size)
    hidden = hidden_LH.to(place, dtype).requires_grad_()
    table = torch.nn.Parameter(table_VH.to(place, dtype))
    table.main_grad = torch.zeros(table.shape, device=place)  # type: ignore[attr-defined]
    shard = token_losses.VocabularyShard(0, NUM_TOKENS, group, fuses_gradient=True)
    with chunks_of(104):
        losses_L = token_losses.token_losses(hidden, table, labels_L.to(place), shard)
        (losses_L * weights_L.to(place)).sum().backward()
    assert hidden.grad is not None
    return [losses_L.detach(), hidden.grad, table.main_grad]  # type: ignore[attr-defined]


def _from_all(own: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own)
    return parts


def exact(case: Case) -> Found:
    """Computes the same in fp64 on all rows."""
    hidden_LH, table_VH, labels_L, weights_L = _numbers(recipes.LANGUAGE.hidden_size)
    hidden = hidden_LH.double().requires_grad_()
    table = table_VH.double().requires_grad_()
    logits = hidden @ table[:NUM_TOKENS].t()
    losses = torch.nn.functional.cross_entropy(logits, labels_L, reduction="none")
    (losses * weights_L).sum().backward()
    assert hidden.grad is not None
    return Found(losses.detach(), hidden.grad, None if case.table == "frozen" else table.grad)


# ---- deliberate bugs ----

BUGS = {
    "every rank has a softmax of its own": 2,
    "labels are counted from the rank's first row": 2,
    "gradients of hidden states are not summed over ranks": 2,
    "padding takes part": 1,
    "softmax knows the last chunk only": 1,
    "the last chunk's gradient of hidden states is the whole": 1,
    "chunks of the table's gradient lie one row too far": 1,
}


def with_bugs(bugs: list[str], parallel: ParallelConfig, case: Case) -> dict[str, Found]:
    """Returns what the chunks find while each of the named bugs is in place."""
    topology = build_topology(parallel, 0)
    found = {}
    for bug in bugs:
        problem = _problem(topology, parallel, case)
        with chunks_of(case.chunk_rows), _bug(bug, problem):
            found[bug] = _found(problem, in_chunks)
    return found


def _bug(bug: str, problem: _Problem) -> Any:
    patch = mock.patch.object
    read, add, reduce = token_losses._read, token_losses._Sum.add, dist.all_reduce
    shard = problem.layer.shard

    def forgetful(logits: Tensor, place: Tensor, before: object) -> Any:
        return read(logits, place, None)

    def overwriting(self: Any, grad: Tensor, rows: Tensor) -> None:
        self._total = None
        add(self, grad, rows)

    def of_vectors(tensor: Tensor, *args: Any, **kwargs: Any) -> None:
        if tensor.shape != problem.hidden_LBH.squeeze(1).shape:
            reduce(tensor, *args, **kwargs)

    def shifted(self: Any, start: int, stop: int, grad: Tensor, hidden: Tensor) -> None:
        self._main_grad[start + 1 : stop] += (grad.t() @ hidden)[:-1]

    reductions = SimpleNamespace(all_reduce=of_vectors, ReduceOp=dist.ReduceOp)
    patches = (
        lambda: patch(token_losses, "_over_ranks", lambda own, group: own),
        lambda: patch(problem.layer, "shard", replace(shard, first=0)),
        lambda: patch(token_losses, "dist", reductions),
        lambda: patch(problem.layer, "shard", replace(shard, rows=len(problem.table))),
        lambda: patch(token_losses, "_read", forgetful),
        lambda: patch(token_losses._Sum, "add", overwriting),
        lambda: patch(token_losses._TableGradient, "add", shifted),
    )
    return dict(zip(BUGS, patches, strict=True))[bug]()
