"""FLOPs a second and MFU of a step and its parts, as a record has them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist

from nvlm_train import costs
from nvlm_train.costs import StepWork
from nvlm_train.recipe.load import load_recipe
from nvlm_train.train.part_timer import PartSeconds
from nvlm_train.train.reduce_metrics import StepResult
from nvlm_train.train.schedule import Position
from nvlm_train.train.tracking.progress import summary
from nvlm_train.train.tracking.step_record import StepSeconds, step_record

WORK = StepWork(tokens=1000, attention_pairs=20_000, trained_tokens=100, tiles=6)
PARTS = PartSeconds(encode=0.5, layers=2.0, output=0.25, optimizer=0.25, waiting=1.0)
RANKS = 2


def a_record(
    monkeypatch: pytest.MonkeyPatch, card: str | None, work: StepWork = WORK
) -> dict[str, float | int | str]:
    monkeypatch.setattr(dist, "get_world_size", lambda: RANKS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: card is not None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: card)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    result = StepResult(1.0, 1.0, (1.0,), (work.trained_tokens,), work, 3, 0, 1)
    seconds = StepSeconds(loading=0.5, total=PARTS.total, parts=PARTS)
    recipe = load_recipe(["experiment=smoke"])
    return step_record(recipe, ["s"], Position("sft", 1), 1e-4, result, seconds)


def test_mfu_is_flops_over_the_card_s_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(["experiment=smoke"])
    flops = costs.step_flops_by_part(recipe.model, recipe.stages["sft"], WORK)
    found = a_record(monkeypatch, "NVIDIA H200")
    assert found["tflops_per_rank"] == pytest.approx(flops.total / 4.0 / RANKS / 1e12)
    assert found["mfu"] == pytest.approx(flops.total / 4.0 / RANKS / 989e12)
    for part, seconds in {"encode": 0.5, "layers": 2.0, "output": 0.25}.items():
        speed = getattr(flops, part) / RANKS / seconds
        assert found[f"seconds/{part}"] == seconds
        assert found[f"tflops_per_rank/{part}"] == pytest.approx(speed / 1e12)
        assert found[f"mfu/{part}"] == pytest.approx(speed / 989e12)
    assert found["seconds/optimizer"] == 0.25 and found["seconds/waiting"] == 1.0
    assert "mfu/optimizer" not in found and "tflops_per_rank/waiting" not in found


@pytest.mark.parametrize("card", [None, "NVIDIA Unheard Of"])
def test_without_a_peak_there_is_no_mfu(monkeypatch: pytest.MonkeyPatch, card: str | None) -> None:
    found = a_record(monkeypatch, card)
    assert not [name for name in found if "mfu" in name]
    assert found["tflops_per_rank"] > 0 and found["tflops_per_rank/layers"] > 0


def test_a_step_without_tiles_has_no_speed_of_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    found = a_record(monkeypatch, "NVIDIA H200", dataclasses.replace(WORK, tiles=0))
    assert "tflops_per_rank/encode" not in found and "mfu/encode" not in found
    assert "mfu/layers" in found


def test_the_line_says_mfu_and_where_the_time_went(monkeypatch: pytest.MonkeyPatch) -> None:
    line = summary({**a_record(monkeypatch, "NVIDIA H200"), "mfu": 0.4567})
    assert "MFU 45.7%" in line
    assert line.endswith("(encode 12% layers 50% output 6% optimizer 6% waiting 25%)")
    assert "MFU" not in summary(a_record(monkeypatch, None))


def test_parts_of_the_flops_are_all_of_them() -> None:
    """The encoder's forward pass, the logits of trained tokens, and everything else."""
    recipe = load_recipe(["experiment=smoke"])
    model, stage = recipe.model, recipe.stages["sft"]
    work = dataclasses.replace(WORK, cross_tokens=10, context_tokens=20, cross_pairs=30)
    found = costs.step_flops_by_part(model, stage, work)
    assert found.total == costs.step_flops(model, stage, work)
    assert found.encode == costs.vision_tile_flops(model.vision) * 6
    products = 2.0 * model.language.hidden_size * model.language.vocab_size * 100
    assert found.output == products * (3 if "language_model" in stage.trainable else 2)
