"""Where a module's parameters lie in the files of a layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from nvlm_train.config.model_schema import VisionConfig
from nvlm_train.convert.encoders.layout import Layout
from nvlm_train.convert.headers import Stored


def placed(
    module: nn.Module, layout: Layout, config: VisionConfig
) -> Mapping[str, tuple[int, ...]]:
    """The stored tensors that the parameters are made of, each whole and once: name to shape."""
    shapes = layout.files.shapes(config)
    stored = {name: Stored(shape, "F32", Path("file")) for name, shape in shapes.items()}
    found: dict[str, tuple[int, ...]] = {}
    for name, parameter in module.named_parameters():
        places = layout.places(name, config, stored)
        for place, part in zip(places, parameter.chunk(len(places)), strict=True):
            assert place.index == () and place.stored not in found, name
            found[place.stored] = tuple(part.shape)
    return found
