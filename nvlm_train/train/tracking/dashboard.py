"""Defines a wandb workspace for a run: sections of panels over the fields of a `StepRecord`."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from nvlm_train.config.schema import Recipe
from nvlm_train.errors import NvlmError
from nvlm_train.train.part_timer import COMPUTED, PARTS

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

SECTIONS: dict[str, tuple[tuple[str, ...], ...]] = {
    "Learning": (("loss",), ("grad_norm",), ("lr",), ("skipped_samples",)),
    "Speed": (
        ("tokens_per_second",),
        ("tflops_per_rank",),
        ("mfu",),
        tuple(f"seconds/{part}" for part in PARTS),
        tuple(f"mfu/{part}" for part in COMPUTED),
        ("seconds", "data_seconds"),
        ("peak_memory_gib",),
    ),
    "Data": (("tokens", "trained_tokens"), ("tiles",), ("samples",), ("data_position",)),
}
"""Title of a section -> its line plots, each with its metrics."""

BY_SOURCE = {"loss": "^loss/", "trained_tokens": "^trained_tokens/"}
"""Plots with a line for each source of the blend: title -> pattern of metric names."""


def workspace(recipe: Recipe, entity: str) -> Workspace:
    """Builds the workspace. Nothing is sent until its `save` is called.

    Args:
        recipe: its name, project and stages are used.
        entity: the wandb user or team.

    Raises:
        NvlmError: wandb-workspaces is not installed.
    """
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise NvlmError("a dashboard needs wandb-workspaces: pip install 'nvlm-train[dashboard]'")
    import wandb_workspaces.reports.v2 as panels
    from wandb_workspaces import workspaces

    def plot(**settings: Any) -> Any:
        return panels.LinePlot(x="global_step", **settings)

    sections = [
        workspaces.Section(
            name=title, is_open=True, panels=[plot(y=list(metrics)) for metrics in plots]
        )
        for title, plots in SECTIONS.items()
    ]
    by_source = [plot(title=f"{name} by source", metric_regex=pattern)
                 for name, pattern in BY_SOURCE.items()]  # fmt: skip
    tables = [
        panels.WeavePanelSummaryTable(table_name=f"examples/{name}") for name in recipe.schedule
    ]
    sections.append(workspaces.Section(name="Sources", is_open=True, panels=by_source))
    sections.append(workspaces.Section(name="Examples", is_open=True, panels=tables))
    return workspaces.Workspace(
        entity=entity,
        project=recipe.tracking.project,
        name=f"nvlm-train {recipe.name}",
        sections=sections,
        settings=workspaces.WorkspaceSettings(x_axis="global_step"),
    )
