"""Which attention is chosen, how torch's versions are asked, and what a GPU computes."""

from __future__ import annotations

import inspect
import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nvlm_train.device_batch import Spans
from nvlm_train.model import cross_attention
from nvlm_train.model.attention import intervals
from nvlm_train.model.attention.choice import Cores, choose_cores
from nvlm_train.model.attention.packed import causal_options
from nvlm_train.parallel.kernels import Available, Kernels, choose
from tests.model import attention_runs
from tests.model.attention_runs import Problem

ENGINE = choose(Available(True, True, False, False))
TORCH = choose(Available(True, False, False, False))
OLD_TORCH = choose(Available(True, False, False, False, varlen=False))
OLD_GPU = choose(Available(True, False, False, False, half_precision_heads=False))
CPU = choose(Available(False, True, False, False))

SIGNATURES: dict[str, tuple[str, dict[str, Any]]] = {
    "2.10": (
        "query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None",
        {"is_causal": True},
    ),
    "2.11": (
        "query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, "
        "window_size=(-1, -1)",
        {"window_size": (-1, 0)},
    ),
    "2.12": (
        "query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, "
        "window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None",
        {"window_size": (-1, 0), "enable_gqa": True},
    ),
}
"""torch's version -> the signature in its documentation, and what the call says beside its tensors."""


@pytest.mark.parametrize(
    ("kernels", "changes", "expected"),
    [
        (CPU, {}, Cores("sdpa", "sdpa", "sdpa")),
        (CPU, {"attention_dropout": 0.1}, Cores("sdpa", "sdpa", "sdpa")),
        (TORCH, {}, Cores("varlen", "flex", "flex")),
        (TORCH, {"params_dtype": torch.float32}, Cores("flex", "flex", "flex")),
        (TORCH, {"kv_channels": 20}, Cores("flex", "flex", "flex")),
        (TORCH, {"kv_channels": 320}, Cores("flex", "flex", "flex")),
        (OLD_TORCH, {}, Cores("flex", "flex", "flex")),
        (OLD_GPU, {}, Cores("sdpa", "sdpa", "sdpa")),
        (ENGINE, {}, Cores("transformer_engine", "transformer_engine", "flex")),
    ],
)
def test_choice(kernels: Kernels, changes: dict[str, Any], expected: Cores) -> None:
    assert choose_cores(_config(**changes), kernels) == expected


@pytest.mark.parametrize(
    ("changes", "named"), [({"attention_dropout": 0.1}, "attention_dropout=0.1"),
                           ({"kv_channels": 8}, "head size 8")]
)  # fmt: skip
def test_a_fallback_says_why(changes: dict[str, Any], named: str) -> None:
    plain, engine = (choose_cores(_config(**changes), each) for each in (TORCH, ENGINE))
    assert (plain.tokens, plain.wanted, plain.context) == ("sdpa", "sdpa", "sdpa")
    # Transformer Engine's kernel drops weights; what attends to a context beside it does not.
    assert (engine.tokens, engine.context) == ("transformer_engine", "sdpa")
    for each in (plain, engine):
        assert each.reason is not None
        assert named in each.reason


def _config(**changes: Any) -> Any:
    plain = {"attention_dropout": 0.0, "kv_channels": 128, "params_dtype": torch.bfloat16}
    return SimpleNamespace(**plain | changes)


@pytest.mark.parametrize("version", SIGNATURES)
def test_each_torch_is_told_in_its_own_words(version: str) -> None:
    signature, expected = SIGNATURES[version]
    function = eval(f"lambda {signature}: None")
    options = causal_options(inspect.signature(function).parameters)
    assert options == expected
    function(*range(7), **options)


def test_the_installed_torch_has_one_of_these_signatures() -> None:
    from torch.nn.attention.varlen import varlen_attn

    own = inspect.signature(varlen_attn).parameters
    names = [
        [part.split("=")[0].strip() for part in text.split(", ") if part != "*" and "=" in part]
        for text, _ in SIGNATURES.values()
    ]
    assert [name for name in own if own[name].default is not inspect.Parameter.empty] in [
        [name for name in each if name.isidentifier()] for each in names
    ]


# ---- the same numbers ----

LENGTHS: list[tuple[int, ...]] = [(300,), (40, 1, 200, 59), (128, 128, 44), (7, 3)]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("kind", attention_runs.TASKS)
def test_flex_finds_what_sdpa_does(kind: str, lengths: tuple[int, ...]) -> None:
    """In fp64, as torch computes it without a compiler; queries, keys and values have gradients."""
    problem = Problem.made(lengths, torch.float64)
    with attention_runs.flex_without_a_compiler():
        found = attention_runs.run(kind, "flex", problem)
    _agree(found, attention_runs.run(kind, "sdpa", problem), 1e-12)


@pytest.mark.parametrize("lengths", [*LENGTHS, (600, 9, 300)])
@pytest.mark.parametrize("kind", ["tokens", "wanted"])
def test_one_function_finds_what_many_do(kind: str, lengths: tuple[int, ...]) -> None:
    problem = Problem.made(lengths, torch.float64)
    found = attention_runs.run(kind, attention_runs.JOINED_CORE, problem)
    _agree(found, attention_runs.run(kind, "sdpa", problem), 1e-12)


@pytest.mark.parametrize("share", [0, 0.3, 1])
def test_one_function_for_wanted_rows_of_some_segments(share: float) -> None:
    """Segments of which nothing is wanted, some rows, more than are asked for at once, all rows."""
    lengths = (40, 1, 700, 59)
    few = range(41, 41 + round(700 * share))
    problem = replace(Problem.made(lengths, torch.float64), wanted=(*range(20), *few, 799))
    found = attention_runs.run("wanted", attention_runs.JOINED_CORE, problem)
    _agree(found, attention_runs.run("wanted", "sdpa", problem), 1e-12)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_one_function_attends_to_a_context_as_many_do(
    lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Problem.made(lengths, torch.float64)
    # The second has a span of no token, between others: as in the last layer, where nothing of it is wanted.
    empty = problem.spans[0]._replace(start=1, stop=1)
    for each in (problem, replace(problem, spans=(empty, *problem.spans))):
        found = attention_runs.run("context", "sdpa", each)
        with monkeypatch.context() as patched:
            patched.setattr(cross_attention, "attend_spans", cross_attention.compose_spans)
            composed = attention_runs.run("context", "sdpa", each)
        _agree(found, composed, 1e-12)


def test_a_gradient_that_is_written_and_not_added_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Deliberate bug: of the spans that read a part of the context, the last one's gradient is kept."""
    problem = Problem.made((40, 1, 200, 59), torch.float64)
    expected = attention_runs.run("context", "sdpa", problem)
    monkeypatch.setattr(Tensor, "add_", Tensor.copy_)
    found = attention_runs.run("context", "sdpa", problem)
    assert (found[0] - expected[0]).norm() == 0
    assert (found[2] - expected[2]).norm() > 1e-3 * expected[2].norm()


def test_what_sees_nothing_gets_zero() -> None:
    problem = Problem.made((40, 1, 200, 59), torch.float64)
    unseen = intervals.of_spans(problem.spans, 300, problem.context).sees_Q == 0
    assert unseen.any()
    with attention_runs.flex_without_a_compiler():
        output, query, *_ = attention_runs.run("context", "flex", problem)
    for each in (output[unseen], query[unseen]):
        assert not each.any()


def test_a_wrong_interval_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deliberate bug: tokens of a context see one key less."""
    right = intervals.of_spans

    def shorter(spans: Spans, num_queries: int, num_keys: int) -> intervals.Intervals:
        return right(
            tuple(span._replace(last=span.last - 1) for span in spans), num_queries, num_keys
        )

    problem = Problem.made((40, 1, 200, 59), torch.float64)
    expected = attention_runs.run("context", "sdpa", problem)
    monkeypatch.setattr(intervals, "of_spans", shorter)
    with attention_runs.flex_without_a_compiler():
        found = attention_runs.run("context", "flex", problem)
    assert (found[0] - expected[0]).norm() > 1e-3 * expected[0].norm()


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [*LENGTHS, (2000, 1500, 596), (33,) * 40])
@pytest.mark.parametrize(
    ("kind", "core", "dtype"),
    [
        ("tokens", "varlen", torch.bfloat16),
        *((kind, "flex", torch.bfloat16) for kind in attention_runs.TASKS),
        *((kind, "flex", torch.float32) for kind in attention_runs.TASKS),
    ],
)
def test_cuda_finds_what_a_cpu_does(
    kind: str, core: str, dtype: torch.dtype, lengths: tuple[int, ...]
) -> None:
    """Shapes differ from pack to pack: none may be left to what is not compiled."""
    problem = Problem.made(lengths, dtype, channels=64)
    found = [each.cpu() for each in attention_runs.run(kind, core, problem.on("cuda"))]
    expected = attention_runs.run(kind, "sdpa", problem.to(torch.float32))
    _agree(found, expected, 1e-4 if dtype == torch.float32 else 2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", attention_runs.TASKS)
def test_cuda_compiles_few_times_and_never_waits(kind: str) -> None:
    """Thirty packs of other shapes: at most eight kernels' worth of graphs, and no synchronisation."""
    draw = random.Random(0)
    core = "varlen" if kind == "tokens" else "flex"
    made = [
        Problem.made(
            [draw.randint(1, 400) for _ in range(draw.randint(1, 6))], torch.bfloat16, channels=64
        ).on("cuda")
        for _ in range(30)
    ]
    for problem in made[:3]:
        attention_runs.run(kind, core, problem)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for problem in made[3:]:
            attention_runs.run(kind, core, problem)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before <= 5


def _agree(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for own, other in zip(found, expected, strict=True):
        distance = (own.to(other.dtype) - other).norm()
        assert distance <= tolerance * max(float(other.norm()), 1e-6)
