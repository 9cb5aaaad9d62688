"""The workspace as a definition: each panel over a metric that a step writes. Saving needs a server."""

from __future__ import annotations

import inspect
import json
import re

import pytest

from nvlm_train.config.load import load_recipe
from nvlm_train.train.tracking import step_record
from nvlm_train.train.tracking.dashboard import BY_SOURCE, SECTIONS, workspace


def test_every_plot_has_a_metric_that_exists() -> None:
    written = inspect.getsource(step_record.step_record)
    for plots in SECTIONS.values():
        for metric in (metric for metrics in plots for metric in metrics):
            assert f'"{metric}":' in written, metric
    for pattern in BY_SOURCE.values():
        assert f'f"{pattern[1:]}{{name}}"' in written and re.match(pattern, f"{pattern[1:]}vqa")


def test_the_definition_has_all_panels() -> None:
    pytest.importorskip("wandb_workspaces")
    recipe = load_recipe(["experiment=smoke"])
    made = workspace(recipe, "me")
    sent = json.dumps(made._to_model().model_dump(mode="json", by_alias=True))
    for metric in ("loss", "grad_norm", "tflops_per_rank", "^loss/", "examples/sft"):
        assert f'"{metric}"' in sent or metric in sent, metric
    assert [section.name for section in made.sections][:1] == ["Learning"]
    assert len(made.sections) == len(SECTIONS) + 2
