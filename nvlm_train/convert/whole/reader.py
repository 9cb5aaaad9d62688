"""Reads the projector of a released NVLM-D into any layout: the slices that a rank holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor

from nvlm_train.config.model_schema import ModelConfig
from nvlm_train.convert.names import GlobalSlice
from nvlm_train.convert.problem import refuse
from nvlm_train.convert.weight_files import WeightFiles
from nvlm_train.convert.whole.projector import open_projector, projector_problems

_STORED = {
    "projector.norm.weight": "mlp1.0.weight",
    "projector.norm.bias": "mlp1.0.bias",
    "projector.mlp.linear_fc1.weight": "mlp1.1.weight",
    "projector.mlp.linear_fc2.weight": "mlp1.3.weight",
}
"""Global names to names in the files. `mlp1.2` is the GELU."""


class ProjectorSource:
    """A source for `model.global_weights.fill` of the tensors in `projector.weights`."""

    def __init__(self, files: WeightFiles) -> None:
        self.files = files

    def __call__(self, wanted: GlobalSlice, into: Tensor) -> bool:
        """Writes a slice of a global tensor; returns False for tensors of other parts of the model."""
        if wanted.name not in _STORED:
            return False
        self.files.copy_into(into, _STORED[wanted.name], wanted.index)
        return True

    def expect(self, slices: Iterable[GlobalSlice]) -> None:
        """Counts the bytes of what will be asked for, which the lines about progress then name."""
        for each in slices:
            if each.name in _STORED:
                self.files.bytes_expected += self.files.bytes_of(_STORED[each.name], each.index)


@contextmanager
def projector_source(model: ModelConfig) -> Iterator[ProjectorSource]:
    """Opens `projector.weights` for reading.

    Raises:
        CheckpointError: the directory is not whole, or has another projector than the recipe describes.
    """
    refuse(projector_problems(model))
    setting = f"model.projector.weights={model.projector.weights}"
    with WeightFiles(open_projector(model).headers.tensors, setting) as files:
        yield ProjectorSource(files)
