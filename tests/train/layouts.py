"""Layouts in which the tests of training run both stages of the smoke recipe."""

from __future__ import annotations

PARALLEL = {
    "single": (1, {}),
    "TP2": (2, {"tensor": 2, "sequence_parallel": "true"}),
    "PP2": (2, {"pipeline": 2}),
    "DP2": (2, {}),
    "TP2 PP2": (4, {"tensor": 2, "pipeline": 2}),
    "PP2 DP2": (4, {"pipeline": 2}),
    "PP2 DP2 without overlap": (4, {"pipeline": 2, "overlap_grad_reduce": "false"}),
}
NO_DROPOUT = ("stages.pretrain.hidden_dropout=0", "stages.pretrain.attention_dropout=0")
"""Dropout masks depend on the layout: losses of different layouts are compared without any."""


def layout(name: str) -> tuple[int, list[str]]:
    """Returns world size and overrides that put both stages into a layout."""
    world, fields = PARALLEL[name]
    return world, [
        f"stages.{stage}.parallel.{field}={value}"
        for stage in ("pretrain", "sft")
        for field, value in fields.items()
    ]
