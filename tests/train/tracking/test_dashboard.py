"""The workspace as a definition: each panel over a metric that a step writes. Saving needs a server."""

from __future__ import annotations

import json
import re
from dataclasses import fields

import pytest

from nvlm_train.recipe.load import load_recipe
from nvlm_train.train.part_timer import COMPUTED, PARTS
from nvlm_train.train.tracking.dashboard import BY_SOURCE, SECTIONS, workspace
from nvlm_train.train.tracking.step_record import SourceRecord, StepRecord


def test_every_plot_has_a_metric_that_exists() -> None:
    written = {each.name for each in fields(StepRecord)} | {"mfu"}
    written |= {f"seconds/{part}" for part in PARTS} | {f"mfu/{part}" for part in COMPUTED}
    by_source = SourceRecord(loss=0.0, trained_tokens=0).named("vqa")
    for plots in SECTIONS.values():
        for metric in (metric for metrics in plots for metric in metrics):
            assert metric in written, metric
    for title, pattern in BY_SOURCE.items():
        assert [name for name in by_source if re.match(pattern, name)] == [f"{title}/vqa"]


def test_the_definition_has_all_panels() -> None:
    pytest.importorskip("wandb_workspaces")
    recipe = load_recipe(["experiment=smoke"])
    made = workspace(recipe, "me")
    sent = json.dumps(made._to_model().model_dump(mode="json", by_alias=True))
    for metric in ("loss", "grad_norm", "tflops_per_rank", "^loss/", "examples/sft"):
        assert f'"{metric}"' in sent or metric in sent, metric
    assert [section.name for section in made.sections][:1] == ["Learning"]
    assert len(made.sections) == len(SECTIONS) + 2
