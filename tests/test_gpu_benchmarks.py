"""The GPU benchmarks run at toy size, and read traces, plans and spans rightly."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.gpu import rows as gpu_rows
from benchmarks.gpu import targets
from benchmarks.gpu.activity import Activity, read_activity
from benchmarks.gpu.packs import digest, encode, make_plan, pack, without_images
from benchmarks.gpu.shapes import LARGE, TOY, make_recipe
from benchmarks.gpu.tables import tables
from benchmarks.gpu_parts.cross import disjoint_sets
from benchmarks.gpu_parts.variants import Timing, Variant, compare, relative_error
from nvlm_train import costs
from nvlm_train.costs import StepWork
from tests.doctor.test_ranks import free_port


def run(module: str, *options: str) -> dict[str, Any]:
    environment = {**os.environ, "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", module, "--toy", *options],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_rows_of_a_toy() -> None:
    names = ["d", "x", "d_shards", "transformers", "encoder_300m"]
    found = run("benchmarks.gpu", "--rows", *names, "--repeats", "1", "--warm-up", "0")
    rows = found["rows"]
    assert list(rows) == names
    assert found["plan"] == digest(make_plan(TOY))
    d, x, shards, reference, encoder = rows.values()
    same = ("samples", "trained_tokens", "tokens", "tiles", "tflop", "predicted_gib")
    assert {name: shards[name] for name in same} == {name: d[name] for name in same}
    for row in (d, x, shards):
        assert 0 < row["part_ms"]["layers"] <= sum(row["part_ms"].values()) < 1.2 * row["ms"] + 50
    assert shards["data_ms"] >= 0 and shards["loader_samples_per_s"] > 0
    assert d["tokens"] == reference["tokens"] > x["tokens"]
    assert d["samples"] == x["samples"] == reference["samples"] == TOY.samples
    assert d["tiles"] == x["tiles"] == reference["tiles"]
    # The same initial distribution and labels: both begin near a uniform guess, and both learn.
    for row in (d, x, shards, reference):
        assert row["losses"][0] == pytest.approx(math.log(1024), abs=0.3)
        assert row["losses"][-1] < row["losses"][0]
        assert row["operations"] > 1000
    assert encoder["tiles_per_s"] > 0


def test_targets_are_read_off_the_rows_of_a_run() -> None:
    d = {"tokens_per_s": 30.0, "samples_per_s": 10.0, "mfu": 0.44, "busy": 0.96, "peak_gib": 44.0,
         "predicted_gib": 40.0}  # fmt: skip
    rows: dict[str, dict[str, Any]] = {
        "d": d, "x": d | {"samples_per_s": 17.6}, "h": d | {"samples_per_s": 12.5, "peak_gib": 45.0},
        "text": d | {"mfu": 0.5}, "transformers": d | {"tokens_per_s": 15.0},
        "d_stage_1": d | {"samples_per_s": 14.0},
        "encoder_300m": {"tiles_per_s": 700.4}, "encoder_6b": {"tiles_per_s": 40.9},
    }  # fmt: skip
    assert set(rows) == set(targets.ROWS)
    answers = [each.answer(rows) for each in targets.TARGETS]
    assert answers == [
        "2.00", "0.44, missed", "0.88, missed", "0.96", "1.76", "1.25, missed", "1.40", "700",
        "40.9, missed", "1.10", "1.10", "1.12, missed",
    ]  # fmt: skip
    # On a CPU, or when a row failed, nothing is said.
    assert (
        targets.TARGETS[-1].answer({"h": {"peak_gib": None, "predicted_gib": 1.0}})
        == "not measured"
    )
    assert targets.TARGETS[0].answer({"d": {"error": "no kernel"}}) == "not measured"


@pytest.mark.slow
def test_parts_of_a_toy() -> None:
    rows = run("benchmarks.gpu_parts", "--repeats", "1")["rows"]
    parts = {row["part"] for row in rows}
    assert {
        "rope",
        "attention",
        "cross_attention",
        "loss",
        "layer",
        "recompute",
        "encoder_6b",
    } <= parts
    for row in rows:
        assert row.get("error", 0.0) < 1e-2, row
    assert sum("error" in row for row in rows) > 15


def test_a_variant_that_fails_says_so_and_the_others_go_on() -> None:
    one, three = torch.ones(2), torch.full((2,), 3.0)

    def refuses() -> Any:
        raise NotImplementedError("no such kernel")

    rows = compare(
        "part",
        lambda: (one,),
        [Variant("bad", refuses), Variant("right", lambda: lambda: (one,)),
         Variant("wrong", lambda: lambda: (three,))],
        Timing(1, 1),
    )  # fmt: skip
    assert rows[0]["failed"] == "NotImplementedError: no such kernel"
    assert [row.get("error") for row in rows[1:]] == [0.0, 2.0]
    assert math.isnan(relative_error([one, torch.tensor([math.nan])], [one, torch.ones(1)]))


def test_a_trace_is_counted() -> None:
    events = [
        {"cat": "kernel", "name": "gemm", "ts": 10.0, "dur": 5.0},
        {"cat": "kernel", "name": "beside it", "ts": 12.0, "dur": 5.0},
        {"cat": "gpu_memcpy", "name": "Memcpy DtoH (Device -> Pageable)", "ts": 30.0, "dur": 1.0},
        {"cat": "gpu_memset", "name": "Memset (Device)", "ts": 40.0, "dur": 2.0},
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 1.0, "dur": 1.0},
        {"cat": "cuda_driver", "name": "cuLaunchKernelEx", "ts": 2.0, "dur": 1.0},
        {"cat": "cuda_runtime", "name": "cudaStreamSynchronize", "ts": 3.0, "dur": 9.0},
        {"cat": "cpu_op", "name": "aten::mm", "ts": 0.0, "dur": 4.0},
        {"name": "process_name", "ph": "M"},
    ]
    activity = read_activity(events)
    assert activity == Activity(
        gpu_ms=0.01,
        kernels=2,
        launches=2,
        synchronisations=1,
        host_reads=1,
        operations=1,
        kernel_ms={
            "gemm": 0.005,
            "beside it": 0.005,
            "Memcpy DtoH (Device -> Pageable)": 0.001,
            "Memset (Device)": 0.002,
        },
    )
    assert list(activity.longest(3)) == ["gemm", "beside it", "Memset (Device)"]
    # Kernels of one template differ behind their first characters: together they count.
    alike = {"x" * 90 + "1": 2.0, "x" * 90 + "2": 1.0, "y": 2.5}
    assert replace(activity, kernel_ms=alike).longest(2) == {"x" * 90: 3.0, "y": 2.5}


def test_the_plan_fills_packs_and_text_only_has_the_same_lengths() -> None:
    plan = make_plan(LARGE)
    lengths = {}
    for architecture in ("d", "x", "h"):
        samples = encode(architecture, LARGE, plan)
        lengths[architecture] = [len(sample.token_ids) for sample in samples]
        filled = sum(lengths[architecture]) / LARGE.pack_length
        assert filled > 0.92 * len(pack(samples, LARGE.pack_length))
        assert {sample.num_tiles for sample in samples} == {1, 3, 4, 5, 6, 7}
    texts = [without_images(sample) for sample in encode("d", LARGE, plan)]
    assert [len(text.token_ids) for text in texts] == lengths["d"]
    assert {each.num_tiles for each in pack(texts, LARGE.pack_length)} == {0}


def test_flops_by_part_add_up() -> None:
    recipe = make_recipe("h", LARGE)
    stage = recipe.stages["sft"]
    work = StepWork(8000, 10_000_000, 2000, 40, 8000, 9000, 70_000)
    parts = gpu_rows.flops_by_part(recipe.model, stage, work)
    assert sum(parts.values()) == pytest.approx(costs.step_flops(recipe.model, stage, work))
    assert set(parts) == {"encoder", "projector", "layers", "attention", "trained", "cross"}
    # 304 M parameters, each met once by 1,025 tokens of a tile, and attention between these.
    assert parts["encoder"] / 40 == pytest.approx(
        2 * 304e6 * 1025 + 24 * 4 * 1025**2 * 1024, rel=0.02
    )


def test_spans_in_sets_whose_context_ascends() -> None:
    tags = [(10, 12, 0, 256), (12, 14, 256, 512)]
    after = [(14, 90, 0, 512)]
    assert disjoint_sets(tags + after) == [tags, after]


def test_a_recipe_of_another_language_model() -> None:
    model = make_recipe("x", replace(LARGE, language="3b")).model
    assert model.language.hidden_size == 2048
    assert model.projector.ffn_hidden_size is None


def test_tables_show_figures_and_failures() -> None:
    steps = {"rows": {"d": {"ms": 1234.56, "mfu": 0.1234, "packs": 8}, "x": {"error": "Broken: a|b"},
                      "encoder_6b": {"tiles_per_s": 12.3}}}  # fmt: skip
    parts = {"rows": [{"part": "rope", "variant": "gathered", "ms": 0.51234, "error": 0.002}]}
    asked, training, encoders, rope = tables([steps, parts])
    assert asked.splitlines()[3:5] == [
        "| D, MFU (0.50 is hoped for) | at least 0.45 | 0.12, missed |",
        "| D, MFU over the text-only model's | at least 0.90 | not measured |",
    ]
    assert training.splitlines() == [
        "| row | packs | ms a step | MFU |",
        "| --- | --- | --- | --- |",
        "| d | 8 | 1,235 | 0.1234 |",
        "| x | failed: Broken: a/b |",
    ]
    assert encoders.splitlines()[-1] == "| encoder_6b | 12.3 |"
    assert rope.splitlines()[-1] == "| gathered | 0.002 | 0.5123 |"
